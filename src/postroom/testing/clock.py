"""A clock that moves only when told to."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

_ROUNDS = 30
"""Turns of the event loop after which what was woken has gone as far as it can without more time."""


class ManualClock:
    """A :class:`postroom.clock.Clock` for tests on one event loop: ``advance`` lets time pass, in order.

    What waits on another thread, or for a real file or socket, is not waited for.
    """

    def __init__(self, start: float = 1_750_000_000.0) -> None:
        self._now = start
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    def now(self) -> float:
        return self._now

    async def wait(self, event: asyncio.Event, timeout: float | None) -> bool:
        if event.is_set() or (timeout is not None and timeout <= 0):
            return event.is_set()
        if timeout is None:
            return await event.wait()
        over = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + timeout, next(self._order), over))
        happening = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait({over, happening}, return_when=asyncio.FIRST_COMPLETED)
            return event.is_set()
        finally:
            over.cancel()
            happening.cancel()

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass: everyone is woken at their time, one after the other, and gets to run then."""
        if seconds < 0:
            raise ValueError(f"advance: seconds must not be negative, not {seconds}")
        target = self._now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            due, _, over = heapq.heappop(self._sleepers)
            if not over.done():
                self._now = max(self._now, due)
                over.set_result(None)
                await self.settle()
        self._now = target
        await self.settle()

    async def settle(self) -> None:
        """Let everything run that can without more time."""
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
