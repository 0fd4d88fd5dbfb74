"""Taking messages from the broker: as many as can run, and a few more where handlers are quick."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from postroom.broker.base import Delivery
from postroom.errors import BrokerUnavailable
from postroom.worker.source import Source

logger = logging.getLogger("postroom.worker")

PREFETCH_HORIZON = 0.05
"""Seconds of work that may wait in the worker: what is claimed here no idle worker can take."""
MAX_PREFETCH = 500
_FIRST_PAUSE = 0.1
_LAST_PAUSE = 5.0
_IDLE_CHECK = 1.0


class Pace:
    """How long handlers take, and from that how much to hold ready."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._mean: float | None = None
        self.spent = 0.0
        """Seconds that finished handlers took, since last asked."""
        self.finished = 0

    def prefetch(self) -> int:
        """Deliveries worth holding beyond those that run; none until the first handlers have shown their pace."""
        if self.finished:
            mean = self.spent / self.finished
            self.spent, self.finished = 0.0, 0
            self._mean = mean if self._mean is None else 0.7 * self._mean + 0.3 * mean
        if self._mean is None:
            return 0
        return min(MAX_PREFETCH, int(self._concurrency * PREFETCH_HORIZON / max(self._mean, 1e-5)))


class Fetcher:
    """One loop for all sources of a worker: they share its capacity, and take turns."""

    def __init__(
        self,
        sources: Sequence[Source],
        concurrency: int,
        pace: Pace,
        hand_over: Callable[[Source, list[Delivery]], None],
    ) -> None:
        self._sources = list(sources)
        self._concurrency = concurrency
        self._pace = pace
        self._hand_over = hand_over
        self._unsettled = 0
        self._room = asyncio.Event()
        self._room.set()
        self._held_back = False
        self._drained: Callable[[], object] | None = None
        self.failing = False
        """Whether the broker could not be reached at the last attempt."""

    def freed(self, count: int) -> None:
        """So many deliveries are being settled."""
        self._unsettled -= count
        self._room.set()

    def hold_back(self, held_back: bool) -> None:
        """Take nothing while the handlers' loop is stuck: an idle worker should have it."""
        self._held_back = held_back
        self._room.set()

    def when_idle(self, drained: Callable[[], object]) -> None:
        """Call ``drained`` whenever a look at all sources found nothing and nothing is unsettled."""
        self._drained = drained

    async def run(self) -> None:
        """Until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            await self._wait_for_room()
            try:
                await self._fetch()
                if self.failing:
                    logger.info("the broker is back")
                self.failing, pause = False, _FIRST_PAUSE
            except BrokerUnavailable as error:
                logger.warning("cannot fetch messages, trying again in %.1f s: %s", pause, error)
                self.failing = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)

    def _free(self) -> int:
        if self._held_back:
            return 0
        return self._concurrency + self._pace.prefetch() - self._unsettled

    async def _wait_for_room(self) -> None:
        while self._free() <= 0:
            self._room.clear()
            await self._room.wait()

    async def _fetch(self) -> None:
        if len(self._sources) == 1:
            found = await self._take(self._sources[0], _IDLE_CHECK)
        else:
            found = await self._sweep() or await self._first()
        if not found and self._unsettled == 0 and self._drained is not None:
            self._drained()

    async def _take(self, source: Source, timeout: float) -> bool:
        free = self._free()
        if free <= 0:
            return False
        deliveries = await source.consumer.receive(free, timeout)
        if deliveries:
            self._unsettled += len(deliveries)
            self._hand_over(source, deliveries)
        return bool(deliveries)

    async def _sweep(self) -> bool:
        """Ask every source for what it has now, beginning with the one that was not served last."""
        found = False
        for source in list(self._sources):
            if await self._take(source, 0.0):
                found = True
                self._sources.remove(source)
                self._sources.append(source)
        return found

    async def _first(self) -> bool:
        """All are empty: wait for whichever gets a message first."""
        waits = [asyncio.ensure_future(self._take(source, _IDLE_CHECK)) for source in self._sources]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            results = await asyncio.gather(*waits, return_exceptions=True)
        errors = [item for item in results if isinstance(item, Exception)]
        if errors:
            raise errors[0]
        return any(item is True for item in results)


class Watchdog:
    """Gives back what has waited too long in this worker for a free slot."""

    PATIENCE = 1.0
    """Seconds."""

    def __init__(self, fetcher: Fetcher, release_older_than: Callable[[float], int], pumped: Callable[[], int]) -> None:
        """``release_older_than(monotonic time)`` returns how many it released; ``pumped()`` counts the turns of the
        handlers' loop."""
        self._fetcher = fetcher
        self._release = release_older_than
        self._pumped = pumped

    async def run(self) -> None:
        """Until cancelled."""
        stuck_at: int | None = None
        while True:
            await asyncio.sleep(self.PATIENCE / 2)
            turns = self._pumped()
            if self._release(time.monotonic() - self.PATIENCE):
                stuck_at = turns
                self._fetcher.hold_back(True)
            elif stuck_at is not None and self._pumped() != stuck_at:
                stuck_at = None
                self._fetcher.hold_back(False)
