"""Between running jobs and their records: progress goes out, requests to cancel come in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from postroom.errors import BrokerUnavailable
from postroom.message import Progress
from postroom.store.base import JobStore
from postroom.worker.source import Source
from postroom.worker.work import Work

logger = logging.getLogger("postroom.worker")

INTERVAL = 0.25
"""Seconds between reports, and between looks for cancellations."""


class Reporter:
    """``report`` may be called from any thread; the rest happens on the broker's loop."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._latest: dict[Work, Progress] = {}

    def report(self, work: Work, progress: Progress) -> None:
        """Remember the latest progress of a running handler."""
        self._latest[work] = progress

    async def run(self, store: JobStore) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self._send(store)
                await self._look_for_cancellations(store)
            except BrokerUnavailable as error:
                logger.warning("cannot reach the job records: %s", error)

    async def _send(self, store: JobStore) -> None:
        latest, self._latest = self._latest, {}
        if latest:
            await store.report([(work.delivery, progress) for work, progress in latest.items()])

    async def _look_for_cancellations(self, store: JobStore) -> None:
        """Only of handlers that have run for a while: quick ones end sooner than a cancellation would reach them."""
        before = time.time() - INTERVAL
        running = [
            delivery
            for source in self._sources
            for delivery, work in source.held.items()
            if 0.0 < work.started_at < before and work.why is None
        ]
        for delivery in await store.cancelled(running) if running else []:
            for source in self._sources:
                if delivery in source.held:
                    source.held[delivery].interrupt("cancelled")
