"""Checks of what only some orders ask for: a time, a key, a cancellation, a redrive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise

from postroom.broker.base import Ack, Cancel, Dead
from postroom.message import JobState
from postroom.testing.simulation.judge import Judge
from postroom.testing.simulation.observed import Order

_CLAIMED = 1.5
"""Seconds for which a worker may hold a message before it starts its handler, with some room."""


def _early(judge: Judge) -> Iterator[str]:
    """C6: never before its time."""
    for order in [] if judge.clock_was_set else judge.seen.orders.values():
        if order.delay and not order.unique:
            for run in judge.runs(order):
                if run.started < order.ready_at - 1e-3:
                    yield f"{order.label} was started {order.ready_at - run.started:.3f} s early"


def _expired(judge: Judge) -> Iterator[str]:
    """C2: what has expired does not start, and what has not does not expire."""
    for order in judge.seen.orders.values():
        if order.expires_in is None:
            if any(record.state is JobState.EXPIRED for record in judge.records(order, order.subscriptions[0])):
                yield f"{order.label} has expired, and was to be kept for ever"
        elif order.published_at is not None and not judge.clock_was_set:
            latest = order.published_at + order.expires_in + _CLAIMED
            for run in judge.runs(order):
                if run.started > latest and not judge.troubled(run, run.started):
                    yield f"{order.label} was started {run.started - latest + _CLAIMED:.3f} s after it had expired"


def _deduplicated(judge: Judge) -> Iterator[str]:
    """C11: one key, one message, one id for all."""
    ids: dict[str, set[str]] = defaultdict(set)
    for order in judge.seen.orders.values():
        if order.idempotency_key is not None and order.unique is None:
            ids[order.idempotency_key] |= order.ids
    for key, found in ids.items():
        if len(found) > 1:
            yield f"{key} was confirmed under {len(found)} ids"


def _single(judge: Judge) -> Iterator[str]:
    """C11: unique until done: one at a time, and the next one when that has ended."""
    orders = _confirmed(judge, "until_done")
    ends = {item.id: item.at for item in judge.seen.settled if isinstance(item.outcome, Ack | Dead | Cancel)}
    for first, second in pairwise(sorted(orders, key=lambda order: order.tried_at)):
        (id,), (later,) = first.ids, second.ids
        runs = judge.runs(first)
        if id == later and id in ends and ends[id] < second.tried_at:
            yield f"{second.label} was answered with a job that had ended"
        if id != later and runs and _at(first) < second.tried_at and _at(second) < runs[0].started:
            yield f"{second.label} is a second job, and {first.label} had not begun"
    runs = sorted((run for run in judge.seen.runs if run.label == "single"), key=lambda run: run.started)
    for run, later_run in pairwise(runs):
        overlap = run.ended is None or run.ended > later_run.started
        if overlap and run.id != later_run.id and not judge.troubled(run, later_run.started):
            yield f"two jobs of {run.label} ran at once"


def _latest(judge: Judge) -> Iterator[str]:
    """C11: of those that replace one another the last one counts, and those that still waited never run."""
    orders = _confirmed(judge, "until_started")
    for first, second in combinations(orders, 2):
        if first.tried_at > second.tried_at:
            first, second = second, first
        replaced = _at(first) < second.tried_at and _at(second) < first.ready_at and not judge.clock_was_set
        if replaced and first.ids != second.ids and judge.runs(first):
            yield f"{first.label} was replaced by {second.label} before its time, and ran"
    if orders:
        last = max(orders, key=lambda order: order.tried_at)
        others = [_at(order) for order in orders if order is not last]
        if last.tried_at > max(others, default=0.0) and judge.state(last) not in (JobState.SUCCEEDED, JobState.DEAD):
            yield f"{last.label} was the last one, and is {judge.state(last)}"


def _cancelled(judge: Judge) -> Iterator[str]:
    """What is cancelled before it starts never starts."""
    for order in judge.seen.orders.values():
        if order.cancelled == "cancelled" and order.cancelled_at is not None:
            late = [run for run in judge.runs(order) if run.started > order.cancelled_at]
            if any(not judge.troubled(run, run.started) for run in late):
                yield f"{order.label} was started after it was cancelled"
            if judge.state(order) is not JobState.CANCELLED:
                yield f"{order.label} was cancelled, and is {judge.state(order)}"


def _mended(judge: Judge) -> Iterator[str]:
    """C8: what fails does not succeed before it is mended; after that and a redrive it does."""
    redriven = judge.seen.redriven
    for order in judge.seen.orders.values():
        if order.task != "poison":
            continue
        for record in judge.records(order, order.subscriptions[0]):
            redrives = redriven.get((record.id, order.subscriptions[0]), [])
            ended_by = record.failures[-1].reason if record.failures else ""
            if record.state is JobState.SUCCEEDED and order.told not in judge.seen.mended:
                yield f"{order.label} succeeded, which it cannot"
            if any(redrive.mended and redrive.confirmed for redrive in redrives) and not (
                record.state is JobState.SUCCEEDED or ended_by == "worker_lost"
            ):
                yield f"{order.label} was mended and redriven, and is {record.state}"


CHECKS: tuple[Callable[[Judge], Iterator[str]], ...] = (
    _early, _expired, _deduplicated, _single, _latest, _cancelled, _mended
)  # fmt: skip


def _confirmed(judge: Judge, unique: str) -> list[Order]:
    return [
        order for order in judge.seen.orders.values() if order.unique == unique and order.published_at is not None
    ]  # fmt: skip


def _at(order: Order) -> float:
    assert order.published_at is not None
    return order.published_at
