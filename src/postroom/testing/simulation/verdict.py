"""What a run must not show: each check names the promise it keeps, and takes the faults of the run into account."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

from postroom.broker.base import Ack, Cancel, Dead, Release
from postroom.message import Failure, JobState
from postroom.testing.simulation import wishes
from postroom.testing.simulation.app import RETRY
from postroom.testing.simulation.bank import ACCOUNTS, OPENING
from postroom.testing.simulation.judge import Judge
from postroom.testing.simulation.observed import Observed, Order, Run


def violations(seen: Observed, *, shared_file: bool, clock_was_set: bool) -> list[str]:
    """``shared_file``: who freezes with the file locked holds everybody up."""
    judge = Judge(seen, shared_file=shared_file, clock_was_set=clock_was_set)
    return seen.unexpected + [violation for check in CHECKS for violation in check(judge)]


def _lost(judge: Judge) -> Iterator[str]:
    """C1, C2, C13: what was confirmed, or committed with the producer's transaction, comes to an end."""
    for order in judge.seen.orders.values():
        # An own transaction that was rolled back leaves an id that never came to be.
        confirmed = order.label in judge.seen.kept if order.joined else order.published_at is not None
        for subscription in order.subscriptions:
            states = [record.state for record in judge.records(order, subscription)]
            if confirmed and not any(state.final for state in states):
                yield f"{order.label} is lost in {subscription}: {states or 'no record'}"
            if order.joined and not confirmed and (states or judge.runs(order)):
                yield f"{order.label} exists though its transaction was not committed"


def _phantom(judge: Judge) -> Iterator[str]:
    """Nothing runs that nobody published, nor where it was not wanted, and each is there once."""
    for label, runs in judge.runs_of.items():
        orders = judge.orders_of.get(label, [])
        if not any(order.attempted for order in orders):
            yield f"{label} runs, and was never published"
        for run in runs:
            if orders and run.subscription not in orders[0].subscriptions:
                yield f"{label} runs in {run.subscription}"
        ids = {run.id for run in runs}
        if len(ids) > 1 and not any(order.unique for order in orders):
            yield f"{label} exists {len(ids)} times"


def _effects(judge: Judge) -> Iterator[str]:
    """C12: once if it succeeded, at most once whatever else became of it."""
    counts = Counter(label for label, _ in judge.seen.ledger)
    for label, count in counts.items():
        if count > 1:
            yield f"the effect of {label} happened {count} times"
    for order in judge.seen.orders.values():
        paying = "amount" in order.arguments
        if paying and judge.state(order) is JobState.SUCCEEDED and counts[order.told] == 0:
            yield f"{order.label} has succeeded, and its effect never happened"


def _money(judge: Judge) -> Iterator[str]:
    """Nothing was made, nothing vanished, and the ledger says the same."""
    balances = judge.seen.balances
    if sum(balances.values()) != OPENING * len(ACCOUNTS):
        yield f"the balances add up to {sum(balances.values())}: {balances}"
    paid = sum(amount for _, amount in judge.seen.ledger)
    if balances and OPENING - balances[ACCOUNTS[0]] != paid:
        yield f"the ledger says {paid} were paid, the account {OPENING - balances[ACCOUNTS[0]]}"


def _order(judge: Judge) -> Iterator[str]:
    """C14: of one key one at a time, in publish order."""
    lines: dict[str, list[Order]] = defaultdict(list)
    for order in judge.seen.orders.values():
        if order.key is not None:
            lines[order.key].append(order)
    for line in lines.values():
        begun = [order for order in line if judge.runs(order)]
        for before, after in pairwise(begun):
            first = min(run.started for run in judge.runs(after))
            for run in judge.runs(before):
                end = math.inf if run.ended is None else run.ended
                if (run.started > first or end > first) and not judge.troubled(run, first):
                    yield f"{after.label} ran before {before.label} was done"


def _attempts(judge: Judge) -> Iterator[str]:
    """C7: each failure counts once, and there are no more than the policy allows; a redrive begins anew."""
    limit = RETRY.max_attempts
    for (id, subscription), record in judge.seen.records.items():
        rounds = _rounds(record.failures)
        redrives = judge.seen.redriven.get((id, subscription), [])
        if any([failure.attempt for failure in each] != list(range(1, len(each) + 1)) for each in rounds) or len(
            rounds
        ) > 1 + len(redrives):
            numbers = [failure.attempt for failure in record.failures]
            yield f"{id[-6:]} in {subscription}: its failures have the numbers {numbers}"
        for number, each in enumerate(rounds, 1):
            # One more, if the death of a worker used up the last one: it is not started again.
            most = limit + 1 if each[-1].reason == "worker_lost" else limit
            dead = record.state is JobState.DEAD or number < len(rounds)
            if len(each) > most or (dead and len(each) < limit):
                yield f"{id[-6:]} in {subscription} is {record.state} after {len(each)} failures"
        if (record.state is JobState.DEAD) != ((id, subscription) in judge.seen.letters):
            yield f"{id[-6:]} in {subscription} is {record.state}, unlike the dead letters"


def _rounds(failures: tuple[Failure, ...] | list[Failure]) -> list[list[Failure]]:
    """The failures from one redrive to the next."""
    rounds: list[list[Failure]] = []
    for failure in failures:
        if failure.attempt == 1 or not rounds:
            rounds.append([])
        rounds[-1].append(failure)
    return rounds


def _innocent(judge: Judge) -> Iterator[str]:
    """C7: what succeeds when it is let, dies only of faults; a killer takes it along once, as nobody knows him yet."""
    killers = sum(order.task == "killer" for order in judge.seen.orders.values())
    for order in judge.seen.orders.values():
        if order.task in ("poison", "killer"):
            continue
        for subscription in order.subscriptions:
            for record in judge.records(order, subscription):
                others = [failure for failure in record.failures if not _excused(failure, order)]
                if record.state is JobState.DEAD and others:
                    yield f"{order.label} is dead in {subscription}: {others[0].reason} {others[0].message}"
                lost = sum(failure.reason == "worker_lost" for failure in record.failures)
                if lost > killers + judge.seen.strikes:
                    yield f"{order.label} was lost {lost} times in {subscription}"


def _apart(judge: Judge) -> Iterator[str]:
    """C7: what asks for it, and what may have killed its process, runs apart from the others."""
    for run in judge.seen.runs:
        orders = judge.orders_of.get(run.label)
        record = judge.seen.records.get((run.id, run.subscription))
        if not orders or record is None or (run.id, run.subscription) in judge.seen.redriven:
            continue
        before = [failure for failure in record.failures if failure.attempt == run.attempt - 1]
        suspect = any(failure.reason == "worker_lost" for failure in before)
        if (suspect or orders[0].task == "apart") and not run.process.startswith("child"):
            yield f"{run.label} ran in {run.process} as attempt {run.attempt}, among others"


def _excused(failure: Failure, order: Order) -> bool:
    fails = failure.attempt <= order.arguments.get("fails", 0)
    return fails or failure.reason == "worker_lost" or failure.error == "sqlite3.OperationalError"


def _holders(judge: Judge) -> Iterator[str]:
    """C3, C7: nobody starts what another runs, or started and did not fail, unless something happened to him."""
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in judge.seen.runs:
        runs[run.id, run.subscription].append(run)
    released = {
        (item.id, item.subscription, item.attempt)
        for item in judge.seen.settled
        if isinstance(item.outcome, Release)
    }  # fmt: skip
    for (id, subscription), own in runs.items():
        for number, later in enumerate(own):
            if later.attempt > RETRY.max_attempts:
                yield f"{later.label} was started as attempt {later.attempt}"
            for run in own[:number]:
                # Who was frozen may begin what is another's meanwhile, before it hears of that.
                if judge.troubled(run, later.started) or judge.troubled(later, later.started):
                    continue
                if run.ended is None or run.ended > later.started:
                    yield f"{run.label} ran in {run.process} and {later.process} at once"
                if later.attempt > run.attempt or (id, subscription, run.attempt) in released:
                    continue
                if not judge.redriven_between(run, later):
                    yield f"{run.label} was started twice as attempt {run.attempt}"


def _settled_once(judge: Judge) -> Iterator[str]:
    """C5: what was confirmed as settled for good is not settled again by anybody, but for redrives."""
    ends = Counter(
        (item.id, item.subscription) for item in judge.seen.settled if isinstance(item.outcome, Ack | Dead | Cancel)
    )
    for (id, subscription), count in ends.items():
        if count > 1 + len(judge.seen.redriven.get((id, subscription), ())):
            yield f"{id[-6:]} in {subscription} was settled {count} times"


def _backwards(judge: Judge) -> Iterator[str]:
    """A state that is final stays, and attempts only grow, but for redrives."""
    seen = judge.seen
    # Of an event, the subscription that is furthest from a good end is shown: now this one, now that.
    events = {id for order in seen.orders.values() if len(order.subscriptions) > 1 for id in order.ids}
    redriven = {id for id, _ in seen.redriven}
    for id, shown in seen.shown.items():
        for (_, state, attempt), (_, later, later_attempt) in pairwise(shown):
            if state.final and later is not state and not (state is JobState.DEAD and id in redriven):
                yield f"{id[-6:]} was {state}, then {later}"
            if later_attempt < attempt and id not in events and id not in redriven:
                yield f"{id[-6:]} was at attempt {attempt}, then at {later_attempt}"


CHECKS: tuple[Callable[[Judge], Iterator[str]], ...] = (
    _lost, _phantom, _effects, _money, _order, _attempts, _innocent, _apart, _holders, _settled_once, _backwards,
    *wishes.CHECKS,
)  # fmt: skip
