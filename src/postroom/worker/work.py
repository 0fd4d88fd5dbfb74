"""One delivery on its way through a worker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import msgspec

from postroom.broker.base import Cancel, Delivery, Outcome, Release
from postroom.context import Context
from postroom.handler import Handler
from postroom.message import Progress
from postroom.worker import decide

if TYPE_CHECKING:
    from postroom.worker.source import Source

Why = Literal["timeout", "cancelled", "lost", "stopping"]
"""Why a running handler was interrupted. ``lost``: its lease passed to another worker."""


# Interruptions come from the broker's thread, starts and ends from the handlers'.
_mutex = threading.Lock()


class Work(msgspec.Struct, eq=False):
    """A delivery, the handler it goes to, and how to interrupt it."""

    delivery: Delivery
    handler: Handler
    source: Source
    claimed_at: float
    """Monotonic seconds."""
    _report: Callable[[Work, Progress], None]
    started_at: float = 0.0
    """Unix seconds; 0 until the handler starts."""
    is_settling: bool = False
    """Its outcome is under way to the broker, whose answer tells what became of the lease."""
    why: Why | None = None
    timer: asyncio.TimerHandle | None = None
    """Ends the handler when its time is up; belongs to the broker's loop."""
    _context: Context | None = None
    _interrupt: Callable[[Work], None] | None = None

    @property
    def context(self) -> Context:
        """What the handler is told. Made when first asked for: most handlers never do."""
        with _mutex:
            if self._context is None:
                self._context = self._make_context()
            return self._context

    def is_over(self, now: float) -> bool:
        """Whether its lease has ended at that monotonic time, as far as is known here."""
        since = now - self.source.lease
        return self.claimed_at < since and self.source.renewed_at < since

    def _make_context(self) -> Context:
        context = Context(
            self.delivery.message,
            self.delivery.subscription,
            self.delivery.attempt,
            self.handler.options.retry.max_attempts,
            lambda progress: self._report(self, progress),
        )
        context.cancelled = self.why is not None
        return context

    def start(self, interrupt: Callable[[Work], None] | None) -> None:
        """Note the start. ``interrupt`` ends the handler as far as that is possible; it is called at most once."""
        self.started_at = time.time()
        with _mutex:
            self._interrupt = interrupt
            if self.why is not None:
                self._end()

    def interrupt(self, why: Why) -> None:
        """End the running handler, or keep it from starting. The first reason stands."""
        with _mutex:
            if self.why is None:
                self.why = why
                self._end()

    def ends(self) -> bool:
        """Note that the handler has ended by itself: it can no longer be interrupted. False if it was before."""
        with _mutex:
            self._interrupt = None
            return self.why is None

    def interrupted(self) -> Outcome:
        """What becomes of it after the interruption took effect."""
        if self.why == "timeout":
            return decide.timed_out(self.delivery, self.handler.options, self.started_at)
        if self.why == "cancelled":
            return Cancel()
        # A lost lease is refused by the broker whatever is settled; after a stop another worker takes it.
        return Release()

    def _end(self) -> None:
        if self._context is not None:
            self._context.cancelled = True
        if self._interrupt is not None:
            self._interrupt(self)
