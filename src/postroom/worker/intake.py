"""Everything of a worker that happens on the broker's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from postroom.broker.base import Broker, Delivery
from postroom.handler import Handler
from postroom.store.blobs import BlobStore
from postroom.store.sweep import keep_sweeping
from postroom.topology import Topology
from postroom.worker.fetch import Fetcher, Pace, Watchdog
from postroom.worker.lease import LeaseKeeper
from postroom.worker.park import Parking
from postroom.worker.report import Reporter
from postroom.worker.run import Runner
from postroom.worker.settle import Settler
from postroom.worker.source import Source
from postroom.worker.work import Work


class Intake:
    """Fetches, renews, reports and settles for all sources. Made and used on the broker's loop."""

    def __init__(self, broker: Broker, topology: Topology, sources: Sequence[Source], concurrency: int) -> None:
        loop = asyncio.get_running_loop()
        self.pace = Pace(concurrency)
        self._broker = broker
        self._topology = topology
        self._sources = sources
        self._parking = Parking()
        self._tasks: list[asyncio.Task[None]] = []
        self.fetcher = Fetcher(sources, concurrency, self.pace, self._hand_over)
        self.reporter = Reporter(sources)
        self.settler = Settler(loop, self.fetcher.freed, self._ended)
        self._keeper = LeaseKeeper(sources, lambda work: work.interrupt("lost"))
        self._on_ended: Callable[[list[Work]], None] = lambda works: None

    @classmethod
    async def open(cls, broker: Broker, topology: Topology, names: Sequence[str], concurrency: int) -> Intake:
        """Start to consume the named subscriptions."""
        sources = []
        for name in names:
            lease = max(handler.options.lease for handler in topology.handlers(name))
            sources.append(Source(name, await broker.consume(name, lease=lease), lease))
        return cls(broker, topology, sources, concurrency)

    def start(
        self,
        runner: Runner,
        blobs: BlobStore,
        failed: Callable[[BaseException], None],
        ended: Callable[[list[Work]], None],
    ) -> None:
        """Begin to fetch for ``runner``. ``failed`` is told what ended one of the loops, which nothing should."""
        self._runner = runner
        self._on_ended = ended
        watchdog = Watchdog(self.fetcher, runner.release_older_than, lambda: runner.turns)
        loops = [self.fetcher.run(), self._keeper.run(), watchdog.run()]
        if self._broker.capabilities.jobs:
            loops += [self.reporter.run(self._broker.jobs), keep_sweeping(self._broker, blobs)]
        for loop in loops:
            task = asyncio.get_running_loop().create_task(loop)
            task.add_done_callback(partial(_tell, failed))
            self._tasks.append(task)

    async def stop_fetching(self) -> None:
        """Take nothing new, and give back what has not started."""
        await _cancel(self._tasks[:1])
        self._runner.release_older_than(float("inf"))

    def interrupt_all(self) -> None:
        """End every running handler as far as that is possible."""
        for source in self._sources:
            for work in list(source.held.values()):
                work.interrupt("stopping")

    async def close(self, patience: float) -> None:
        """Settle what is decided, for at most ``patience`` seconds, and release all the rest."""
        try:
            async with asyncio.timeout(patience):
                await self.settler.drained()
        except TimeoutError:
            pass  # The broker is away: leases and file locks end with this process, nothing is lost.
        await _cancel(self._tasks)
        # Side by side: one that waits for its last poll must not outlast the leases of the next.
        closing = [source.consumer.close() for source in self._sources]
        for error in await asyncio.gather(*closing, return_exceptions=True):
            if error is not None:
                raise error

    def watch(self, work: Work) -> None:
        """End the handler of ``work`` once its timeout is over. From any thread."""
        self.settler.loop.call_soon_threadsafe(self._set_timer, work)

    def _set_timer(self, work: Work) -> None:
        work.timer = self.settler.loop.call_later(work.handler.options.timeout or 0.0, work.interrupt, "timeout")

    def _hand_over(self, source: Source, deliveries: list[Delivery]) -> None:
        now = time.monotonic()
        works = []
        for delivery in deliveries:
            handler = self._topology.handler(source.name, delivery.message.name)
            work = Work(delivery, handler or self._any_handler(source), source, now, self.reporter.report)
            source.held[delivery] = work
            if handler is None:
                self.settler.add(work, self._parking.outcome(delivery))
            else:
                works.append(work)
        if works:
            self._runner.hand_over(works)

    def _any_handler(self, source: Source) -> Handler:
        """For a task that is not known here: nothing of the handler is used but its options."""
        return self._topology.handlers(source.name)[0]

    def _ended(self, works: list[Work]) -> None:
        self._on_ended(works)


def _tell(failed: Callable[[BaseException], None], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        failed(error)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    # What a loop failed with was told by its callback.
    await asyncio.gather(*tasks, return_exceptions=True)
