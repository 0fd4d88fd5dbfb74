"""What one subscription holds, and who of it is next."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from postroom.broker.base import Subscription, SubscriptionStats
from postroom.broker.memory.copy import Copy

_by_number = attrgetter("number")


class Waiter:
    """A consumer that waits for a message, perhaps on another thread's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.event.set)


class _Lane:
    """Ready copies of one priority. Copies become ready in the order of time, so the order of entry is the order
    of the longer ready; those given back go ahead."""

    def __init__(self) -> None:
        self._ahead: OrderedDict[str, Copy] = OrderedDict()
        self._usual: OrderedDict[str, Copy] = OrderedDict()

    def __iter__(self) -> Iterator[Copy]:
        return chain(self._ahead.values(), self._usual.values())

    def add(self, copy: Copy) -> None:
        (self._ahead if copy.ahead else self._usual)[copy.message.id] = copy

    def remove(self, copy: Copy) -> None:
        del (self._ahead if copy.ahead else self._usual)[copy.message.id]


class SubscriptionState:
    """Its copies by id, the ready ones in lanes by priority, and where it is ordered one line of copies a key.

    Only the head of a line can be ready: the one that runs, else the first published.
    """

    def __init__(self, declared: Subscription) -> None:
        self.declared = declared
        self.copies: dict[str, Copy] = {}
        self.dead: dict[str, Copy] = {}
        """In the order of their death."""
        self.live = 0
        """How many have not ended."""
        self.waiters: set[Waiter] = set()
        self._lanes: dict[int, _Lane] = {}
        self._lines: dict[str, list[Copy]] = {}
        self._heads: dict[str, Copy] = {}

    @property
    def name(self) -> str:
        return self.declared.name

    @property
    def full(self) -> bool:
        return self.declared.limit is not None and self.live >= self.declared.limit

    def wake(self) -> None:
        for waiter in self.waiters:
            waiter.wake()

    def enter(self, copy: Copy, now: float) -> None:
        """A copy that has not ended comes in, or comes back."""
        self.copies[copy.message.id] = copy
        self.live += 1
        key = self._line_of(copy)
        if key is not None:
            insort(self._lines.setdefault(key, []), copy, key=_by_number)
        self.place(copy, now)

    def leave(self, copy: Copy, now: float) -> None:
        """A copy has ended, or goes: it is nobody's turn but the next one's."""
        self.live -= 1
        self.displace(copy)
        key = self._line_of(copy)
        if key is not None:
            self._lines[key].remove(copy)
            if self._heads.get(key) is copy:
                del self._heads[key]
            if self._lines[key]:
                self.place(self._lines[key][0], now)
            else:
                del self._lines[key]

    def place(self, copy: Copy, now: float) -> None:
        """Let a waiting copy be taken, or whichever of its key is next, if it is time."""
        chosen = self._whose_turn(copy)
        if chosen.lease is None and chosen.visible_at <= now and not chosen.placed:
            chosen.placed = True
            self._lanes.setdefault(chosen.message.priority, _Lane()).add(chosen)
        self.wake()

    def displace(self, copy: Copy) -> None:
        """It can no longer be taken."""
        if copy.placed:
            copy.placed = False
            self._lanes[copy.message.priority].remove(copy)

    def redeclare(self, declared: Subscription, now: float) -> None:
        """Changes of ``where``, ``limit`` and pattern concern later messages; one of ``ordered`` all that wait."""
        changed = declared.ordered != self.declared.ordered
        self.declared = declared
        if changed:
            self._lines.clear()
            self._heads.clear()
            live = sorted((copy for copy in self.copies.values() if copy.end is None), key=_by_number)
            self.live -= len(live)
            # The running first: their keys are taken.
            for copy in sorted(live, key=lambda copy: copy.lease is None):
                self.displace(copy)
                self.enter(copy, now)

    def next_ready(self, count: int, suspects: int) -> list[Copy]:
        """Up to ``count`` copies whose turn it is, with at most ``suspects`` suspects among them."""
        found: list[Copy] = []
        for priority in sorted(self._lanes, reverse=True):
            for copy in self._lanes[priority]:
                if len(found) == count:
                    return found
                if copy.suspect:
                    if suspects == 0:
                        continue
                    suspects -= 1
                found.append(copy)
        return found

    def waiting(self) -> list[Copy]:
        return [copy for copy in self.copies.values() if copy.end is None and copy.lease is None]

    def stats(self, now: float, queue: bool) -> SubscriptionStats:
        waiting = self.waiting()
        ready = [copy for copy in waiting if copy.placed]
        return SubscriptionStats(
            name=self.name,
            pattern=self.declared.pattern,
            queue=queue,
            ready=len(ready),
            delayed=len(waiting) - len(ready),
            running=self.live - len(waiting),
            dead=len(self.dead),
            oldest=max((now - copy.ready_since for copy in ready), default=None),
        )

    def _line_of(self, copy: Copy) -> str | None:
        return copy.message.key if self.declared.ordered else None

    def _whose_turn(self, copy: Copy) -> Copy:
        """The head of the line of ``copy``; the copy itself where there is no order."""
        key = self._line_of(copy)
        if key is None:
            return copy
        head = self._heads.get(key)
        if head is None or head.lease is None:
            # Not always the former head: a redriven message may be older than the one that was next.
            first = copy if copy.lease is not None else self._lines[key][0]
            if head is not None and head is not first:
                self.displace(head)
            head = self._heads[key] = first
        return head
