"""What a history proves: nothing lost, nothing invented, no unexplained duplicate, one holder, attempts, order.

After Jepsen's checkers. A history of a whole run ends with everything drained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import msgspec

from postroom.testing.history import Event

_ENDS = frozenset({"ack", "dead", "cancel"})
_GIVES_BACK = frozenset({"retry", "release"})
_SETTLES = _ENDS | _GIVES_BACK


class TotalQueue(msgspec.Struct, frozen=True, kw_only=True):
    """One subscription: what went in against what came out. Valid if nothing is lost, unexpected or unexplained."""

    lost: list[str]
    """Confirmed, never settled for good."""
    unexpected: list[str]
    """Delivered, though nobody tried to publish it, or with other bytes."""
    duplicated: int
    """Deliveries after the first of their message."""
    unexplained: list[str]
    """Delivered again though neither given back, nor lease over, nor holder crashed, nor outcome unknown."""
    recovered: list[str]
    """Delivered though the outcome of their publication was unknown."""

    @property
    def valid(self) -> bool:
        return not (self.lost or self.unexpected or self.unexplained)


def total_queue(history: Iterable[Event], sub: str) -> TotalQueue:
    """I1 no loss, I2 no phantom, I3 explained duplicates."""
    events = list(history)
    published = [event for event in events if event.op == "publish"]
    attempted = {event.id for event in published}
    confirmed = {event.id for event in published if event.outcome == "ok"}
    doubtful = {event.id for event in published if event.outcome == "info"} - confirmed
    digests = {event.id: event.digest for event in published if event.digest}
    by_message = _by_message(events, sub)
    delivered = {message for message, own in by_message.items() if any(event.op == "deliver" for event in own)}
    ended = {message for message, own in by_message.items() if any(_settled(event, _ENDS) for event in own)}
    altered = {
        event.id
        for event in events
        if event.op == "deliver" and event.sub == sub and event.digest != digests.get(event.id, event.digest)
    }
    return TotalQueue(
        lost=sorted(confirmed - ended),
        unexpected=sorted((delivered - attempted) | altered),
        duplicated=sum(max(0, len(_deliveries(own)) - 1) for own in by_message.values()),
        unexplained=sorted(message for message, own in by_message.items() if not _explained(own, events)),
        recovered=sorted(delivered & doubtful),
    )


def resurrected(history: Iterable[Event], sub: str) -> list[str]:
    """I4: delivered after it was confirmed to have ended, and not redriven."""
    found = []
    for message, own in _by_message(history, sub).items():
        ended = False
        for event in own:
            if event.op == "deliver" and ended:
                found.append(message)
            if _settled(event, _ENDS):
                ended = True
            elif event.op == "redrive":
                ended = False
    return sorted(set(found))


def held_twice(history: Iterable[Event], sub: str) -> list[str]:
    """I9: delivered while the lease of another delivery lived."""
    events = list(history)
    found = set()
    for message, own in _by_message(events, sub).items():
        holder: Event | None = None
        for event in own:
            if event.op == "deliver":
                if holder is not None and event.t < (holder.until or 0.0) and not _crashed(holder, event, events):
                    found.add(message)
                holder = event
            elif holder is not None and event.consumer == holder.consumer:
                if event.op == "extend":
                    holder = msgspec.structs.replace(holder, until=event.until)
                elif event.op in _SETTLES and event.outcome != "fail":
                    holder = None
    return sorted(found)


def miscounted(history: Iterable[Event], sub: str) -> list[str]:
    """I10: an attempt other than 1 + the failures before: retries, and crashes that count."""
    events = list(history)
    found = set()
    for message, own in _by_message(events, sub).items():
        expected = 1
        holder: Event | None = None
        for event in own:
            if event.op == "deliver":
                if holder is not None and _crashed(holder, event, events, counted=True):
                    expected += 1
                if event.attempt != expected:
                    found.add(message)
                holder = event
            elif _settled(event, _SETTLES):
                expected += event.op == "retry"
                holder = None
            elif event.op == "redrive":
                expected = 1
    return sorted(found)


def out_of_order(history: Iterable[Event], sub: str) -> list[str]:
    """I22: keys whose first deliveries were not in publish order, or that ran beside each other."""
    published: dict[str, list[str]] = defaultdict(list)
    delivered: dict[str, list[str]] = defaultdict(list)
    running: dict[str, str] = {}
    found = set()
    for event in history:
        if event.op == "publish" and event.outcome == "ok" and event.key is not None:
            published[event.key].append(event.id)
        elif event.sub != sub or event.key is None:
            continue
        elif event.op == "deliver":
            if event.id not in delivered[event.key]:
                delivered[event.key].append(event.id)
            if running.setdefault(event.key, event.id) != event.id:
                found.add(event.key)
        elif _settled(event, _SETTLES) and running.get(event.key) == event.id:
            del running[event.key]
    for key, order in delivered.items():
        place = {message: number for number, message in enumerate(published[key])}
        if any(place.get(one, -1) > place.get(other, -1) for one, other in pairwise(order)):
            found.add(key)
    return sorted(found)


def _by_message(history: Iterable[Event], sub: str) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    for event in history:
        if event.sub == sub and event.op != "crash":
            found[event.id].append(event)
    return found


def _deliveries(own: Iterable[Event]) -> list[Event]:
    return [event for event in own if event.op == "deliver"]


def _settled(event: Event, operations: frozenset[str]) -> bool:
    return event.op in operations and event.outcome == "ok"


def _explained(own: list[Event], events: list[Event]) -> bool:
    """Whether each delivery but the first follows something that allows it."""
    return all(_gap_explains(before, after, own, events) for before, after in pairwise(_deliveries(own)))


def _gap_explains(before: Event, after: Event, own: list[Event], events: list[Event]) -> bool:
    places = [place for place, event in enumerate(own) if event is before or event is after]
    between = own[places[0] + 1 : places[1]]
    given_back = any(_settled(event, _GIVES_BACK) or event.op == "redrive" for event in between)
    doubtful = any(event.outcome == "info" for event in between)
    ended = any(_settled(event, _ENDS) for event in between)
    until = max([event.until or 0.0 for event in between if event.op == "extend"], default=before.until or 0.0)
    return given_back or doubtful or (not ended and (after.t >= until or _crashed(before, after, events)))


def _crashed(holder: Event, later: Event, events: Iterable[Event], *, counted: bool = False) -> bool:
    return any(
        event.op == "crash"
        and event.id == holder.consumer
        and holder.t <= event.t <= later.t
        and (event.counted or not counted)
        for event in events
    )
