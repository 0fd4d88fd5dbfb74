"""The accounts: whatever the history, the effects and the dead letters show that must not be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise

import msgspec

from postroom.testing.history import Event
from postroom.torture.plan import ACCOUNTS, DEPOSIT, MAX_ATTEMPTS, SUBSCRIPTIONS, Errand
from postroom.torture.record import Copy, Record
from postroom.torture.recorder import TOKEN
from postroom.torture.run import Evidence


class Violation(msgspec.Struct, frozen=True):
    """Something that must not be."""

    kind: str
    token: str
    """The message's name in the plan; empty for what concerns all."""
    text: str


CHECKS: dict[str, str] = {
    "lost": "confirmed messages without an end",
    "phantom": "delivered messages that nobody sent, or with another content",
    "copies": "messages stored more than once",
    "unexplained": "second starts without a failure or a fault",
    "fencing": "settlements by a holder whom another had followed",
    "resurrected": "starts after an answered ack",
    "attempts": "attempts counted wrongly",
    "order": "steps out of order, or two of a key at once",
    "effects": "messages with more or less than one effect",
    "money": "accounts that are not as the transfers make them",
    "dead letters": "dead letters missing, too many or incomplete",
    "processes": "processes that ended by themselves",
    "left": "messages that are still on their way",
}
"""Every kind of violation, and what it means."""


class Checker:
    """Of one run."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._record = Record(evidence.history, evidence.run)
        self._errands = evidence.plan.every_errand()
        self._effects = Counter(
            (effect.token, effect.subscription.removeprefix(f"{evidence.run}-")) for effect in evidence.journal
        )

    def violations(self) -> list[Violation]:
        """In the order of ``CHECKS``."""
        checks: list[Callable[[], Iterator[Violation]]] = [
            self._lost, self._phantoms, self._copies, self._unexplained, self._fencing, self._resurrected,
            self._attempts, self._order, self._effects_not_one, self._money, self._dead_letters, self._the_rest,
        ]  # fmt: skip
        return [violation for check in checks for violation in check()]

    @cached_property
    def confirmed(self) -> set[str]:
        """Tokens of what was accepted: the answer said so, or the order was committed."""
        told = {token for token, events in self._record.published.items() if any(e.outcome == "ok" for e in events)}
        return told | self._evidence.ordered

    @cached_property
    def expected(self) -> set[tuple[str, str]]:
        """Token and subscription of every confirmed message."""
        return {
            (token, subscription)
            for token in self.confirmed
            for subscription in SUBSCRIPTIONS[self._errands[token].kind]
        }

    @property
    def record(self) -> Record:
        return self._record

    def _lost(self) -> Iterator[Violation]:
        dead = {token for token, _ in self._dead_tokens()}
        for token, subscription in sorted(self.expected):
            copy = self._record.copies[token, subscription]
            finished = any(end.outcome == "ok" for end in copy.ends) or (token, subscription) in self._effects
            if not finished and token not in dead and self._errands[token].kind != "doomed":
                seen = "was never delivered" if not copy.handed else f"was delivered {len(copy.handed)} times"
                yield Violation("lost", token, f"{subscription}: {seen}, and never handled to its end")

    def _phantoms(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            errand = self._errands.get(token)
            if errand is None or not self._may_exist(errand):
                why = "nobody has sent it" if errand is None or not errand.rollback else "its order was rolled back"
                yield Violation("phantom", token, f"{subscription}: {why}")
            elif any(start.digest != errand.digest for start in copy.starts):
                yield Violation("phantom", token, f"{subscription}: not what was sent")

    def _may_exist(self, errand: Errand) -> bool:
        if errand.outbox:
            return errand.token in self._evidence.ordered and not errand.rollback
        return errand.token in self._record.published

    def _copies(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            messages = {handed.delivered.message for handed in copy.handed}
            if len(messages) > 1:
                yield Violation("copies", token, f"{subscription}: as {', '.join(sorted(messages))}")

    def _unexplained(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            for before, after in pairwise(copy.starts):
                if not self._record.excused(copy, before, copy, after) and not self._doubled(token, copy, after):
                    yield Violation(
                        "unexplained",
                        token,
                        f"{subscription}: started by {before.consumer} and again by {after.consumer} "
                        f"{after.t - before.t:.3f} s later",
                    )

    def _doubled(self, token: str, copy: Copy, event: Event) -> bool:
        """Whether it may be there twice by then: sent twice by a relay, where ids are not known, or given back under
        fault, where that is more than one step."""
        known = self._evidence.capabilities.known_ids
        if not known and self._errands[token].outbox and self._record.relayed_twice(event.t):
            return True
        return not self._evidence.atomic and self._record.doubled(copy, event.t)

    def _fencing(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            for handed in copy.handed:
                settles = handed.settles
                accepted = next((event for event in settles if event.outcome == "ok"), None)
                asked = next((event.t for event in settles if event.outcome == "invoke"), None)
                if accepted is None or asked is None:
                    continue
                mine = handed.delivered
                for other in copy.handed:
                    theirs = other.delivered
                    if (
                        theirs.consumer != mine.consumer
                        and mine.t < other.since
                        and theirs.t < asked
                        and not self._doubled(token, copy, theirs)
                    ):
                        yield Violation(
                            "fencing",
                            token,
                            f"{subscription}: {mine.consumer} could {accepted.op} it "
                            f"{asked - theirs.t:.3f} s after {theirs.consumer} had got it",
                        )

    def _resurrected(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            acks = copy.settled_for_good
            if not acks:
                continue
            acked = min(acks, key=lambda event: event.t)
            late = next((each.delivered for each in copy.handed if each.since > acked.t), None)
            if late is None or self._doubled(token, copy, late):
                continue
            # Not every broker confirms an ack on its own: one that was under way in a fault may be undone.
            if not self._record.harmed(acked.consumer, acked.t - 1.0, acked.t + 1.0):
                yield Violation(
                    "resurrected", token, f"{subscription}: delivered {late.t - acked.t:.3f} s after its ack"
                )

    def _attempts(self) -> Iterator[Violation]:
        for (token, subscription), copy in self._record.copies.items():
            failed = 0
            for start in copy.starts:
                if (
                    start.attempt <= failed
                    and not self._record.late(copy, start)
                    and not self._doubled(token, copy, start)
                ):
                    yield Violation("attempts", token, f"{subscription}: attempt {start.attempt} again")
                    break
                # Where the copy is stored before the original goes, a fault between the two leaves both.
                if copy.failed(start) and not self._record.harmed_while_held(copy, start):
                    failed = start.attempt
            highest = max((start.attempt for start in copy.starts), default=0)
            if subscription == "doomed" and highest > MAX_ATTEMPTS:
                yield Violation("attempts", token, f"attempt {highest}, {MAX_ATTEMPTS} are configured")
            for before, after in pairwise(copy.starts):
                if (
                    after.attempt == before.attempt
                    and self._record.only_killed(copy, before, after)
                    and not self._record.barely_begun(copy, before, after)
                    and not self._doubled(token, copy, after)
                ):
                    yield Violation("attempts", token, f"{subscription}: the death of {before.consumer} did not count")

    def _order(self) -> Iterator[Violation]:
        if not self._evidence.capabilities.ordering:
            return
        effects: dict[str, list[Errand]] = defaultdict(list)
        for effect in self._evidence.journal:
            errand = self._errands.get(effect.token)
            if errand is not None and errand.key is not None and errand not in effects[errand.key]:
                effects[errand.key].append(errand)
        for key, errands in effects.items():
            for one, other in pairwise(errands):
                if one.seq > other.seq:
                    yield Violation("order", other.token, f"{key}: {one.seq} took effect before {other.seq}")
        yield from self._beside_each_other()

    def _beside_each_other(self) -> Iterator[Violation]:
        """Two steps of one key at once, though no fault has hit the one who ran the first."""
        runs: dict[str, list[tuple[float, float, str, Copy, Event]]] = defaultdict(list)
        for (token, subscription), copy in self._record.copies.items():
            for start in copy.starts if subscription == "steps" else ():
                end = copy.end_of(start)
                runs[start.key or ""].append((start.t, start.t if end is None else end.t, token, copy, start))
        for key, own in runs.items():
            own.sort(key=lambda run: run[0])
            for (_, over, token, copy, start), (begin, _, other, other_copy, later) in pairwise(own):
                if token != other and begin < over and not self._record.excused(copy, start, other_copy, later):
                    yield Violation("order", other, f"{key}: started while {token} still ran")

    def _effects_not_one(self) -> Iterator[Violation]:
        for (token, subscription), count in sorted(self._effects.items()):
            if count > 1:
                yield Violation("effects", token, f"{subscription}: {count} effects")
        for token, subscription in sorted(self.expected):
            copy = self._record.copies[token, subscription]
            if any(end.outcome == "ok" for end in copy.ends) and (token, subscription) not in self._effects:
                yield Violation("effects", token, f"{subscription}: handled to its end, without effect")

    def _money(self) -> Iterator[Violation]:
        """Against the plan, not the journal: each transfer that was confirmed or took effect, once."""
        due = [DEPOSIT] * ACCOUNTS
        for token, errand in self._errands.items():
            if errand.kind == "transfer" and (token in self.confirmed or (token, "transfers") in self._effects):
                due[errand.source] -= errand.amount
                due[errand.target] += errand.amount
        held = self._evidence.balances
        for account, (has, should) in enumerate(zip(held, due, strict=True)):
            if has != should:
                yield Violation("money", "", f"account {account} holds {has}, and should hold {should}")
        if sum(held) != DEPOSIT * ACCOUNTS:
            yield Violation("money", "", f"all accounts hold {sum(held)}, and should hold {DEPOSIT * ACCOUNTS}")

    def _dead_tokens(self) -> list[tuple[str, set[int]]]:
        """Of each dead letter: the token, and which attempts it tells of."""
        return [
            # Beyond are deaths of processes in which it waited, and the remark that there will be no further attempt.
            (
                letter.message.headers.get(TOKEN, ""),
                {each.attempt for each in letter.failures if each.attempt <= MAX_ATTEMPTS},
            )
            for letter in self._evidence.dead
        ]

    def _dead_letters(self) -> Iterator[Violation]:
        letters = self._dead_tokens()
        counts = Counter(token for token, _ in letters)
        for token in sorted(self.confirmed):
            if self._errands[token].kind == "doomed" and not counts[token]:
                yield Violation("dead letters", token, "fails always, and is not among the dead letters")
        for token, count in sorted(counts.items()):
            if count > 1:
                yield Violation("dead letters", token, f"{count} dead letters of one message")
            if token not in self._errands or self._errands[token].kind != "doomed":
                yield Violation("dead letters", token, "is dead, though it succeeds in the end")
        for token, attempts in letters:
            if attempts != set(range(1, MAX_ATTEMPTS + 1)):
                yield Violation("dead letters", token, f"tells of attempts {sorted(attempts)}, not 1 to {MAX_ATTEMPTS}")

    def _the_rest(self) -> Iterator[Violation]:
        for ended in self._evidence.ended:
            # Without its broker a process cannot start, and says so; whoever supervises it starts it again.
            if not (ended.refused and self._record.cut_off(ended.actor, ended.t)):
                yield Violation("processes", "", f"{ended.actor} ended by itself: {ended.text}")
        if self._evidence.drained is None:
            left = {each.name: each.ready + each.delayed + each.running for each in self._evidence.stats}
            told = ", ".join(f"{name.partition('-')[2]}: {count}" for name, count in left.items() if count)
            yield Violation("left", "", told or "what the broker does not count, or in the outbox, or of a producer")
