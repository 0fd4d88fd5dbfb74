"""Who is next: what one subscription's consumers in one process have before them. Nothing here does I/O."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any, Literal

from postroom.broker.base import Delivery
from postroom.broker.kafka import wire
from postroom.broker.kafka.ledger import Ledger
from postroom.broker.kafka.wire import Envelope

_KEPT = 100
"""Of what is gone, so many may stay in memory until their time, and as many as wait."""


class Part:
    """One partition, while this process has it."""

    def __init__(self, topic: str, number: int, ledger: Ledger) -> None:
        self.topic = topic
        self.number = number
        self.ledger = ledger
        self.alive = True
        """Ours: what is said of its messages can be committed."""
        self.moving = False
        """The group is sharing out anew: wait and see."""
        self.dirty = False
        self.committed = False
        """Something of it was, or may have been."""
        self.items: dict[int, Item] = {}
        self.paused = False


class Item:
    """A message of a partition. It waits, is out under a claim, or is gone."""

    __slots__ = ("ahead", "claim", "due", "envelope", "offset", "part", "state")

    def __init__(self, part: Part, offset: int, envelope: Envelope) -> None:
        self.part = part
        self.offset = offset
        self.envelope = envelope
        self.due = envelope.due or 0.0
        self.ahead = False
        self.state: Literal["waiting", "out", "gone"] = "waiting"
        self.claim: Claim | None = None

    @property
    def suspect(self) -> bool:
        return self.envelope.suspect or self.offset in self.part.ledger.deaths

    @property
    def deaths(self) -> int:
        return self.part.ledger.deaths.get(self.offset, 0)

    @property
    def attempt(self) -> int:
        return self.envelope.attempt + self.deaths

    def told(self, now: float, **changes: Any) -> Envelope:
        """What a copy says of it: with the deaths of its holders in its history."""
        told = self.envelope
        if self.deaths:
            failures = told.failures()
            failures += [wire.worker_lost(told.attempt + number, now) for number in range(self.deaths)]
            changes = {"history": wire.history(failures), "attempt": self.attempt} | changes
        return wire.changed(told, {"suspect": self.suspect} | changes)


class Claim:
    """The right of one consumer to settle an item."""

    __slots__ = ("consumer", "copy", "item", "outcome", "settled", "started", "suspect", "until")

    def __init__(self, item: Item, consumer: object, until: float) -> None:
        self.item = item
        self.consumer = consumer
        self.until = until
        self.started = False
        self.suspect = item.suspect
        self.outcome: object = None
        """Decided, but perhaps not confirmed yet."""
        self.copy: Envelope | None = None
        """What was kept of it elsewhere already."""
        self.settled = False

    @property
    def alive(self) -> bool:
        return self.item.claim is self and self.item.part.alive

    def delivery(self, subscription: str) -> Delivery:
        item = self.item
        return Delivery(
            message=item.envelope.message,
            subscription=subscription,
            attempt=item.attempt,
            suspect=item.suspect,
            replayed=item.envelope.replayed,
            receipt=self,
        )


class Backlog:
    """Waiting items: what was given back first, then suspects, then the longer ready; the rest when they are due.

    Of one key in an ordered subscription only the first can be taken: the others stand in line behind it.
    """

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        self._ahead: deque[Item] = deque()
        self._suspects: deque[Item] = deque()
        self._ready: deque[Item] = deque()
        self._later: list[tuple[float, int, Item]] = []
        self._gone = 0
        """How many of these are gone, at most."""
        self._lines: dict[str, deque[Item]] = {}
        self._order = count()

    def add(self, item: Item, now: float) -> None:
        item.part.items[item.offset] = item
        line = self._line(item)
        if line is not None:
            line.append(item)
            if line[0] is not item:
                return
        self._place(item, now)

    def give_back(self, item: Item, now: float, *, ahead: bool) -> None:
        """It is to be done again: at once or when it is due."""
        item.state, item.claim, item.ahead = "waiting", None, ahead
        self._place(item, now)

    def remove(self, item: Item, now: float) -> None:
        """It is done, or somebody else's: the next of its key can go."""
        if item.state == "gone":
            return
        item.state, item.claim = "gone", None
        item.part.items.pop(item.offset, None)
        self._gone += item.due > now
        if self._gone > _KEPT + len(self._later) // 2:
            self._later = [entry for entry in self._later if entry[2].state != "gone"]
            heapq.heapify(self._later)
            self._gone = 0
        line = self._line(item)
        if line is not None:
            first = line[0] is item
            line.remove(item)
            if not line:
                del self._lines[item.envelope.message.key or ""]
            elif first:
                self._place(line[0], now)

    def take(self, count: int, suspects: int, now: float) -> Iterator[Item]:
        """Hand out up to ``count`` items that can be done now, at most ``suspects`` of them suspects."""
        self._wake(now)
        for queue, most in ((self._ahead, count), (self._suspects, suspects), (self._ready, count)):
            skipped = []
            while queue and count and most:
                item = queue.popleft()
                if item.state != "waiting" or not item.part.alive:
                    continue
                ledger = item.part.ledger
                if item.part.moving or (item.suspect and not suspects) or not ledger.has_room(item.offset):
                    skipped.append(item)
                    continue
                item.state = "out"
                ledger.hand_out(item.offset)
                count, most = count - 1, most - 1
                suspects -= item.suspect
                yield item
            queue.extendleft(reversed(skipped))

    def next_due(self) -> float | None:
        """When the next delayed one is due."""
        while self._later and (self._later[0][2].state != "waiting" or not self._later[0][2].part.alive):
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def _place(self, item: Item, now: float) -> None:
        if item.due > now:
            heapq.heappush(self._later, (item.due, next(self._order), item))
        elif item.suspect:
            self._suspects.append(item)
        elif item.ahead:
            self._ahead.append(item)
        else:
            self._ready.append(item)

    def _wake(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            item = heapq.heappop(self._later)[2]
            if item.state == "waiting":
                self._place(item, now)

    def _line(self, item: Item) -> deque[Item] | None:
        key = item.envelope.message.key
        return self._lines.setdefault(key, deque()) if self.ordered and key is not None else None
