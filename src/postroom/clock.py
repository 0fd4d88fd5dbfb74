"""Time, injected: no part of Postroom reads the clock or waits except through this."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What a broker and a worker need of time. Seconds as ``float`` everywhere."""

    def now(self) -> float:
        """Unix time in seconds."""
        ...

    async def wait(self, event: asyncio.Event, timeout: float | None) -> bool:
        """Wait until ``event`` is set, at most ``timeout`` seconds (``None``: without end).

        Returns whether the event is set.
        """
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    async def wait(self, event: asyncio.Event, timeout: float | None) -> bool:
        if event.is_set():
            return True
        if timeout is None:
            return await event.wait()
        if timeout <= 0:
            return False
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return event.is_set()
        return True
