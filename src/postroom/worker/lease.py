"""Leases are renewed on the broker's own thread, whatever the handlers do to theirs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from postroom.broker.base import Delivery
from postroom.errors import BrokerUnavailable
from postroom.worker.source import Source
from postroom.worker.work import Work

logger = logging.getLogger("postroom.worker")


class LeaseKeeper:
    """Renews all that a source holds at a third of its lease, and tells who has lost theirs."""

    def __init__(self, sources: Sequence[Source], lost: Callable[[Work], None]) -> None:
        self._sources = sources
        self._lost = lost

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for source in self._sources:
                group.create_task(self._keep(source))

    async def _keep(self, source: Source) -> None:
        pause = source.lease / 3
        while True:
            await asyncio.sleep(pause)
            try:
                await self.renew(source)
                pause = source.lease / 3
            except BrokerUnavailable as error:
                logger.warning("%s: cannot renew %d leases: %s", source.name, len(source.held), error)
                self._give_up_expired(source)
                pause = min(1.0, source.lease / 10)

    async def renew(self, source: Source) -> None:
        """Renew once. Raises ``BrokerUnavailable``."""
        held = list(source.held)
        asked_at = time.monotonic()
        lost = await source.consumer.extend(held) if held else []
        source.renewed_at = asked_at
        for delivery in lost:
            self._drop(source, delivery)

    def _give_up_expired(self, source: Source) -> None:
        """The broker cannot be asked, but what it would say is known: these leases are over."""
        now = time.monotonic()
        for delivery, work in list(source.held.items()):
            if work.is_over(now):
                self._drop(source, delivery)

    def _drop(self, source: Source, delivery: Delivery) -> None:
        work = source.held.get(delivery)
        # What is being settled may be settled by now: it is not held any more, but nothing is lost.
        if work is not None and not work.is_settling:
            del source.held[delivery]
            logger.warning("%s: lost the lease of %s; its handler is stopped", source.name, work.delivery.message.id)
            self._lost(work)
