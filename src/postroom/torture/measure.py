"""What a run was like: how many, how often again, how long after a fault, and how it went over time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec

from postroom.torture.check import Checker, Violation
from postroom.torture.record import BROKER, Copy, Record
from postroom.torture.run import Evidence

_BINS = 120


class Times(msgspec.Struct, frozen=True):
    """Seconds."""

    count: int
    p50: float | None = None
    p99: float | None = None
    longest: float | None = None


class Bin(msgspec.Struct, frozen=True):
    """A piece of the time."""

    at: float
    sent: int
    handled: int
    again: int
    in_flight: int
    """At its end."""


class Mark(msgspec.Struct, frozen=True):
    """A fault on the time line."""

    at: float
    until: float
    kind: str
    target: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that is told of a run. Times are seconds after its beginning."""

    broker: str
    """Without what may be secret."""
    effects: str
    machine: str
    command: str
    """Does the same again."""
    seed: int
    seconds: float
    drained_after: float | None
    """Seconds from the last harm until nothing was left."""
    sent: int
    """Messages that were confirmed."""
    unknown: int
    """Of whose publication nobody knows the outcome."""
    handled: int
    """Handlers that came to their end."""
    dead: int
    again: int
    """Starts of a handler after the first of its message in its subscription, without those after planned failures."""
    unexplained: int
    """Of these, those that no fault explains."""
    refused: int
    """Settlements that were refused to a holder who had lost the message."""
    faults: dict[str, int]
    redelivery: Times
    """From the kill of a worker until another starts what it was running, without the time in which the broker, or the
    worker that had got it next, was struck as well."""
    resumed: Times
    """From when the broker has come back, or from a cut, until the next message is handed over to whom it hit, without
    the time in which the broker was away once more."""
    violations: list[Violation]
    timeline: list[Bin]
    marks: list[Mark]


def outcome_of(
    evidence: Evidence, *, broker: str, effects: str, machine: str, command: str
) -> Outcome:  # fmt: skip
    """Check and measure."""
    checker = Checker(evidence)
    record = checker.record
    violations = checker.violations()
    faults: dict[str, int] = {}
    marks = list(_marks(record, evidence))
    for mark in marks:
        faults[mark.kind] = faults.get(mark.kind, 0) + 1
    copies = list(record.copies.values())
    drained = evidence.drained
    return Outcome(
        broker=broker,
        effects=effects,
        machine=machine,
        command=command,
        seed=evidence.plan.options.seed,
        seconds=evidence.plan.options.seconds,
        drained_after=None if drained is None else round(drained - evidence.healed, 3),
        sent=len(checker.confirmed),
        unknown=sum(events[-1].outcome in ("info", "invoke") for events in record.published.values()),
        handled=sum(end.outcome == "ok" for copy in copies for end in copy.ends),
        dead=len(evidence.dead),
        again=sum(_again(copy) for copy in copies),
        unexplained=sum(violation.kind == "unexplained" for violation in violations),
        refused=sum(e.outcome == "fail" for copy in copies for handed in copy.handed for e in handed.settles),
        faults=faults,
        redelivery=_times(_redeliveries(record)),
        resumed=_times(_resumed(record)),
        violations=violations,
        timeline=_timeline(record, evidence),
        marks=marks,
    )


def _again(copy: Copy) -> int:
    return sum(not copy.failed(before) for before, _ in pairwise(copy.starts))


def _times(seconds: Iterable[float]) -> Times:
    ordered = sorted(seconds)
    if not ordered:
        return Times(0)
    p50, p99 = (round(ordered[int(len(ordered) * share)], 3) for share in (0.50, 0.99))
    return Times(len(ordered), p50, p99, round(ordered[-1], 3))


def _redeliveries(record: Record) -> Iterable[float]:
    crashes = {event.id: event.t for event in record.faults if event.op == "crash"}
    for copy in record.copies.values():
        for before, after in pairwise(copy.starts):
            killed_at = crashes.get(before.consumer)
            if killed_at is not None and copy.end_of(before) is None and after.t > killed_at:
                yield after.t - killed_at - _length(_struck_as_well(record, copy, killed_at, after.t))


def _struck_as_well(record: Record, copy: Copy, begin: float, end: float) -> Iterable[tuple[float, float]]:
    """From the first fault to the start: when the broker was away, or who had got the message next was harmed."""
    yield from _away(record, begin, end)
    holders = [handed for handed in copy.handed if begin < handed.delivered.t <= end]
    for handed, following in pairwise(holders):
        if record.struck(handed.delivered.consumer, handed.delivered.t, following.delivered.t):
            yield handed.delivered.t, following.delivered.t
    for fault in record.faults:
        if holders and fault.id == holders[-1].delivered.consumer and fault.until is not None:
            yield max(holders[-1].delivered.t, fault.t), min(end, fault.until)


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """Of all together; where they overlap, once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        if end > max(begin, reached):
            total += end - max(begin, reached)
            reached = end
    return total


def _resumed(record: Record) -> Iterable[float]:
    delivered = sorted(
        (handed.delivered.t, handed.delivered.consumer) for copy in record.copies.values() for handed in copy.handed
    )
    for fault in record.faults:
        if fault.op in ("cut", "restart") and fault.outcome == "ok":
            over = fault.until or fault.t
            back = next((t for t, who in delivered if t > over and fault.id in (who, BROKER)), None)
            if back is not None:
                yield back - over - _length(_away(record, over, back))


def _away(record: Record, begin: float, end: float) -> Iterable[tuple[float, float]]:
    """When there was no broker between these two."""
    for fault in record.faults:
        if fault.id == BROKER and fault.until is not None:
            yield max(begin, fault.t), min(end, fault.until)


def _marks(record: Record, evidence: Evidence) -> Iterable[Mark]:
    frozen = [fault for fault in record.faults if fault.op == "freeze"]
    for fault in record.faults:
        # A frozen process finds itself to have been without time: that is the same harm.
        known = fault.op == "stall" and any(f.id == fault.id and f.t < (fault.until or 0.0) for f in frozen)
        if fault.outcome == "ok" and not known:
            at = fault.t - evidence.begin
            until = at if fault.until is None else fault.until - evidence.begin
            yield Mark(round(at, 3), round(until, 3), "kill" if fault.op == "crash" else fault.op, fault.id)


def _timeline(record: Record, evidence: Evidence) -> list[Bin]:
    length = max((evidence.drained or evidence.healed) - evidence.begin, 1.0)
    size = length / _BINS
    sent, handled, again, change = ([0] * _BINS for _ in range(4))

    def add(row: list[int], t: float, number: int = 1) -> None:
        row[min(max(int((t - evidence.begin) / size), 0), _BINS - 1)] += number

    for events in record.published.values():
        for event in events:
            if event.outcome == "ok":
                add(sent, event.t)
    crashes = {event.id: event.t for event in record.faults if event.op == "crash"}
    for copy in record.copies.values():
        for start in copy.starts:
            end = copy.end_of(start)
            add(change, start.t)
            over = end.t if end else crashes.get(start.consumer)
            if over is not None:
                add(change, over, -1)
            if end is not None and end.outcome == "ok":
                add(handled, end.t)
        for before, after in pairwise(copy.starts):
            if not copy.failed(before):
                add(again, after.t)
    bins, running = [], 0
    for number in range(_BINS):
        running += change[number]
        bins.append(Bin(round(number * size, 3), sent[number], handled[number], again[number], running))
    return bins
