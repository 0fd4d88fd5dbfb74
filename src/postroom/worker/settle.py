"""Outcomes of all threads, gathered and handed to the broker in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from postroom.broker.base import Ack, Cancel, Dead, Outcome
from postroom.broker.base import Retry as RetryOutcome
from postroom.errors import BrokerUnavailable
from postroom.worker.source import Source
from postroom.worker.work import Work

logger = logging.getLogger("postroom.worker")

_FIRST_PAUSE = 0.05
_LAST_PAUSE = 5.0


class Settler:
    """``add`` may be called from any thread; the rest happens on the broker's loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, freed: Callable[[int], None], ended: Callable[[list[Work]], None]
    ) -> None:
        """``freed(n)``: n deliveries are being settled, as many may be fetched.
        ``ended(works)``: these messages have come to their end, durably."""
        self.loop = loop
        self._freed = freed
        self._ended = ended
        self._waiting: deque[tuple[Work, Outcome]] = deque()
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Work, outcome: Outcome) -> None:
        """Settle soon. Never waits."""
        self._waiting.append((work, outcome))
        # Set after the append, reset before the draining: what is appended is always drained.
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon_threadsafe(self._flush)

    async def drained(self) -> None:
        """Wait until all that was added is settled."""
        while self._waiting or self._tasks:
            self._flush()
            await asyncio.wait(set(self._tasks)) if self._tasks else None

    def _flush(self) -> None:
        self._scheduled = False
        by_source: dict[Source, list[tuple[Work, Outcome]]] = {}
        count = 0
        while self._waiting:
            item = self._waiting.popleft()
            item[0].is_settling = True
            if item[0].timer is not None:
                item[0].timer.cancel()
            by_source.setdefault(item[0].source, []).append(item)
            count += 1
        # First the settles, then the fetching they make room for: both then share one transaction.
        for source, batch in by_source.items():
            task = self.loop.create_task(self._settle(source, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if count:
            self._freed(count)

    async def _settle(self, source: Source, batch: list[tuple[Work, Outcome]]) -> None:
        pause = _FIRST_PAUSE
        pairs = [(work.delivery, outcome) for work, outcome in batch]
        is_late = False
        while True:
            try:
                errors = await source.consumer.settle(pairs)
                break
            except BrokerUnavailable as error:
                if not is_late:
                    # The room was given free in advance. A broker that hands out but takes nothing back fills it once.
                    is_late = True
                    self._freed(-len(pairs))
                # The leases go on being renewed. If they are lost meanwhile the broker refuses the settle later.
                logger.warning("%s: cannot settle %d messages, trying again: %s", source.name, len(pairs), error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)
        if is_late:
            self._freed(len(pairs))
        ended: list[Work] = []
        for (work, outcome), refusal in zip(batch, errors, strict=True):
            source.held.pop(work.delivery, None)
            if refusal is not None:
                logger.warning("%s: %s was not settled: %s", source.name, work.delivery.message.id, refusal)
            elif isinstance(outcome, (Ack, Cancel)):
                ended.append(work)
            elif isinstance(outcome, (Dead, RetryOutcome)):
                _log(work, outcome)
        self._ended(ended)


def _log(work: Work, outcome: Dead | RetryOutcome) -> None:
    message, failure = work.delivery.message, outcome.failure
    what = f"{failure.error or failure.reason}: {failure.message}"
    if isinstance(outcome, RetryOutcome):
        limit = work.handler.options.retry.max_attempts
        logger.warning(
            "%s %s failed (attempt %d of %d), next in %.1f s: %s",
            message.name, message.id, failure.attempt, limit, outcome.delay, what,
        )  # fmt: skip
    else:
        logger.error("%s %s is dead after attempt %d: %s", message.name, message.id, failure.attempt, what)
