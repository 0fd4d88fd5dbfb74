"""What a run must not show: each check names the promise it keeps, and takes the faults of the run into account."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

from postroom.broker.base import Ack, Cancel, Dead, Release
from postroom.message import JobState
from postroom.testing.simulation.app import LEASE, RETRY
from postroom.testing.simulation.bank import ACCOUNTS, OPENING
from postroom.testing.simulation.observed import Observed, Order, Run

Check = Callable[[Observed], Iterator[str]]


def violations(observed: Observed, *, shared_file: bool, clock_was_set: bool) -> list[str]:
    """``shared_file``: who freezes with the file locked holds everybody up."""
    judge = _Judge(observed, shared_file)
    found = list(observed.unexpected)
    for check in (judge.lost, judge.phantom, judge.effects, judge.money, judge.order, judge.attempts, judge.holders,
                  judge.settled_once, judge.deduplicated, judge.cancelled, judge.backwards):  # fmt: skip
        found += check()
    if not clock_was_set:
        found += judge.early()
    return found


class _Judge:
    def __init__(self, observed: Observed, shared_file: bool) -> None:
        self._seen = observed
        self._shared_file = shared_file
        self._by_label: dict[str, list[Run]] = {label: [] for label in observed.orders}
        for run in observed.runs:
            self._by_label.setdefault(run.label, []).append(run)

    def lost(self) -> Iterator[str]:
        """C1, C2, C13: what was confirmed, or committed with the producer's transaction, comes to an end."""
        for order in self._seen.orders.values():
            confirmed = order.published_at is not None or order.label in self._seen.kept
            # An own transaction that was rolled back leaves an id that never came to be.
            ids = order.ids if order.joined or confirmed else ()
            for subscription in order.subscriptions:
                states = [record.state for id in ids if (record := self._seen.records.get((id, subscription)))]
                if confirmed and not any(state.final for state in states):
                    yield f"{order.label} is lost in {subscription}: {states or 'no record'}"
                if order.joined and not confirmed and (states or self._by_label[order.label]):
                    yield f"{order.label} exists though its transaction was not committed"

    def phantom(self) -> Iterator[str]:
        """Nothing runs that nobody published."""
        for label, runs in self._by_label.items():
            order = self._seen.orders.get(label)
            if runs and (order is None or not order.attempted):
                yield f"{label} runs, and was never published"
        for order in self._seen.orders.values():
            ids = {run.id for run in self._by_label[order.label]}
            if len(ids) > 1:
                yield f"{order.label} exists {len(ids)} times"

    def effects(self) -> Iterator[str]:
        """C12: once if it succeeded, at most once whatever else became of it."""
        counts = Counter(label for label, _ in self._seen.ledger)
        for label, count in counts.items():
            if count > 1:
                yield f"the effect of {label} happened {count} times"
        for order in self._paying():
            if self._state(order, order.subscriptions[0]) is JobState.SUCCEEDED and counts[order.label] == 0:
                yield f"{order.label} has succeeded, and its effect never happened"

    def money(self) -> Iterator[str]:
        """Nothing was made, nothing vanished, and the ledger says the same."""
        balances = self._seen.balances
        if sum(balances.values()) != OPENING * len(ACCOUNTS):
            yield f"the balances add up to {sum(balances.values())}: {balances}"
        paid = sum(amount for _, amount in self._seen.ledger)
        if balances and OPENING - balances[ACCOUNTS[0]] != paid:
            yield f"the ledger says {paid} were paid, the account {OPENING - balances[ACCOUNTS[0]]}"

    def order(self) -> Iterator[str]:
        """C14: of one key one at a time, in publish order."""
        lines: dict[str, list[Order]] = defaultdict(list)
        for order in self._seen.orders.values():
            if order.key is not None:
                lines[order.key].append(order)
        for line in lines.values():
            begun = [order for order in line if self._by_label[order.label]]
            for before, after in pairwise(begun):
                first = min(run.started for run in self._by_label[after.label])
                for run in self._by_label[before.label]:
                    end = math.inf if run.ended is None else run.ended
                    if (run.started > first or end > first) and not self._troubled(run, first):
                        yield f"{after.label} ran before {before.label} was done"

    def attempts(self) -> Iterator[str]:
        """C7: each failure counts once, and there are no more than the policy allows."""
        limit = RETRY.max_attempts
        for (id, subscription), record in self._seen.records.items():
            numbers = [failure.attempt for failure in record.failures]
            if numbers != list(range(1, len(numbers) + 1)):
                yield f"{id[-6:]} in {subscription}: its failures have the numbers {numbers}"
            # One more, if the death of a worker used up the last one: it is not started again.
            ended_by = record.failures[-1].reason if record.failures else ""
            most = limit + 1 if ended_by == "worker_lost" else limit
            if len(numbers) > most or (record.state is JobState.DEAD and len(numbers) < limit):
                yield f"{id[-6:]} in {subscription} is {record.state} after {len(numbers)} failures"
            if (record.state is JobState.DEAD) != ((id, subscription) in self._seen.letters):
                yield f"{id[-6:]} in {subscription} is {record.state}, unlike the dead letters"
        for order in self._seen.orders.values():
            if order.task == "poison" and self._state(order, "work") is JobState.SUCCEEDED:
                yield f"{order.label} succeeded, which it cannot"

    def holders(self) -> Iterator[str]:
        """C3, C7: nobody starts what another runs, or started and did not fail, unless something happened to him."""
        runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in self._seen.runs:
            runs[run.id, run.subscription].append(run)
        released = {
            (item.id, item.subscription, item.attempt)
            for item in self._seen.settled
            if isinstance(item.outcome, Release)
        }
        for (id, subscription), own in runs.items():
            for number, later in enumerate(own):
                if later.attempt > RETRY.max_attempts:
                    yield f"{later.label} was started as attempt {later.attempt}"
                for run in own[:number]:
                    # Who was frozen may begin what is another's meanwhile, before it hears of that.
                    if self._troubled(run, later.started) or self._troubled(later, later.started):
                        continue
                    if run.ended is None or run.ended > later.started:
                        yield f"{run.label} ran in {run.process} and {later.process} at once"
                    if later.attempt <= run.attempt and (id, subscription, run.attempt) not in released:
                        yield f"{run.label} was started twice as attempt {run.attempt}"

    def settled_once(self) -> Iterator[str]:
        """C5: what was confirmed as settled for good is not settled again by anybody."""
        ends = Counter(
            (item.id, item.subscription) for item in self._seen.settled if isinstance(item.outcome, Ack | Dead | Cancel)
        )
        for (id, subscription), count in ends.items():
            if count > 1:
                yield f"{id[-6:]} in {subscription} was settled {count} times"

    def deduplicated(self) -> Iterator[str]:
        """C11: one key, one message, one id for all."""
        for order in self._seen.orders.values():
            if order.idempotency_key is not None and len(order.ids) > 1:
                yield f"{order.label} was confirmed under {len(order.ids)} ids"

    def cancelled(self) -> Iterator[str]:
        """What is cancelled before it starts never starts."""
        for order in self._seen.orders.values():
            if order.cancelled == "cancelled" and order.cancelled_at is not None:
                late = [run for run in self._by_label[order.label] if run.started > order.cancelled_at]
                if any(not self._troubled(run, run.started) for run in late):
                    yield f"{order.label} was started after it was cancelled"
                if self._state(order, order.subscriptions[0]) is not JobState.CANCELLED:
                    yield f"{order.label} was cancelled, and is {self._state(order, order.subscriptions[0])}"

    def backwards(self) -> Iterator[str]:
        """A state that is final stays, and attempts only grow."""
        # Of an event, the subscription that is furthest from a good end is shown: now this one, now that.
        events = {id for order in self._seen.orders.values() if len(order.subscriptions) > 1 for id in order.ids}
        for id, shown in self._seen.shown.items():
            for (_, state, attempt), (_, later, later_attempt) in pairwise(shown):
                if state.final and later is not state:
                    yield f"{id[-6:]} was {state}, then {later}"
                if later_attempt < attempt and id not in events:
                    yield f"{id[-6:]} was at attempt {attempt}, then at {later_attempt}"

    def early(self) -> Iterator[str]:
        """C6: never before its time."""
        for order in self._seen.orders.values():
            if order.delay:
                for run in self._by_label[order.label]:
                    if run.started < order.ready_at - 1e-3:
                        yield f"{order.label} was started {order.ready_at - run.started:.3f} s early"

    def _paying(self) -> list[Order]:
        return [order for order in self._seen.orders.values() if "amount" in order.arguments]

    def _state(self, order: Order, subscription: str) -> JobState | None:
        found = [self._seen.records.get((id, subscription)) for id in order.ids]
        return next((record.state for record in found if record is not None), None)

    def _troubled(self, run: Run, until: float) -> bool:
        """Whether it may have lost its lease, or the right to run, by then."""
        processes = [run.process]
        if self._shared_file:
            processes = list(self._seen.troubles)
        return any(
            since <= until and end >= run.started - 2 * LEASE
            for process in processes
            for since, end in self._seen.troubles.get(process, ())
        )
