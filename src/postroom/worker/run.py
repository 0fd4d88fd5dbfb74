"""Running handlers: so many at a time, each where it belongs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from postroom.broker.base import Delivery, Outcome, Release
from postroom.message import Progress
from postroom.worker import decide
from postroom.worker.execute import Executor
from postroom.worker.fetch import Pace
from postroom.worker.isolation import ChildPool
from postroom.worker.settle import Settler
from postroom.worker.source import Source
from postroom.worker.threads import Interrupted, Interruptible, ThreadPool
from postroom.worker.work import Work

logger = logging.getLogger("postroom.worker")


class Runner:
    """Owns the slots. Lives on the handlers' loop; ``hand_over`` and ``release_older_than`` are the broker thread's."""

    def __init__(
        self,
        *,
        concurrency: int,
        executor: Executor,
        children: ChildPool | None,
        settler: Settler,
        pace: Pace,
        watch: Callable[[Work], None],
        report: Callable[[Work, Progress], None],
        threads: ThreadPool,
    ) -> None:
        """``watch(work)`` sees to the timeout of a handler that has one."""
        self._loop = asyncio.get_running_loop()
        self._concurrency = concurrency
        self._executor = executor
        self._children = children
        self._settler = settler
        self._pace = pace
        self._watch = watch
        self._report = report
        self._threads = threads
        self._inbox: deque[Work] = deque()
        self._left: deque[float] = deque()
        """Seconds each handler took that ended in a thread since the last turn."""
        self._scheduled = False
        self._tasks: dict[Work, asyncio.Task[None]] = {}
        self.running = 0
        self.turns = 0
        """How often this loop has come round to starting handlers, or to ending one."""

    def hand_over(self, works: list[Work]) -> None:
        """Run these as slots become free. From any thread."""
        self._inbox.extend(works)
        self._schedule()

    def release_older_than(self, claimed_at: float) -> int:
        """Give back what was claimed before that monotonic time and has not started. From any thread."""
        count = 0
        while self._inbox:
            try:
                work = self._inbox.popleft()
            except IndexError:
                break  # The handlers' loop was quicker.
            if work.claimed_at >= claimed_at:
                self._inbox.appendleft(work)
                break
            self._settler.add(work, Release())
            count += 1
        return count

    async def idle(self) -> None:
        """Wait until no handler runs."""
        while self.running:
            if self._tasks:
                await asyncio.wait(self._tasks.values(), timeout=0.05)
            else:
                await asyncio.sleep(0.02)
            self._turn()

    def close(self) -> None:
        self._threads.close()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        """Collect what has ended in threads, and fill the free slots."""
        self._scheduled = False
        self.turns += 1
        while self._left:
            self._vacate(self._left.popleft())
        works = self._next()
        isolated = [work for work in works if self._is_isolated(work)]
        here = [work for work in works if not self._is_isolated(work)] if isolated else works
        self._note_started(here)
        for work in here:
            if work.handler.is_async:
                self._spawn(work, self._run_async(work))
            elif self._executor.has_middleware:
                self._spawn(work, self._run_surrounded(work))
            else:
                self._run_in_thread(work)
        for work in isolated:
            self._spawn(work, self._run_isolated(work))

    def _next(self) -> list[Work]:
        works: list[Work] = []
        now = time.monotonic()
        while self._inbox and self.running < self._concurrency:
            try:
                work = self._inbox.popleft()
            except IndexError:
                break  # Released by the broker's thread in between.
            limit = work.handler.options.retry.max_attempts
            if work.why is not None:
                self._settler.add(work, work.interrupted())
            elif work.delivery.attempt > limit:
                self._settler.add(work, decide.used_up(work.delivery, limit))
            elif work.is_over(now):
                # This process was frozen: another may run it by now.
                self._settler.add(work, Release())
            else:
                self.running += 1
                works.append(work)
        return works

    def _note_started(self, works: list[Work]) -> None:
        by_source: dict[Source, list[Delivery]] = {}
        for work in works:
            by_source.setdefault(work.source, []).append(work.delivery)
        for source, deliveries in by_source.items():
            source.consumer.started(deliveries)

    def _is_isolated(self, work: Work) -> bool:
        # A suspect may be the one that kills its process: it runs where it can kill nobody else.
        return self._children is not None and (work.delivery.suspect or work.handler.options.isolation is not None)

    def _spawn(self, work: Work, coroutine: Coroutine[Any, Any, None]) -> None:
        # Held here, as the loop itself holds its tasks only weakly.
        self._tasks[work] = self._loop.create_task(coroutine)

    async def _run_async(self, work: Work) -> None:
        self._limit_time(work)
        outcome = await self._executor.acall(work, self._cancel)
        self._finish(work, outcome)

    async def _run_surrounded(self, work: Work) -> None:
        """A sync handler within async middleware."""
        guard = Interruptible()
        self._limit_time(work)
        outcome = await self._executor.acall_in(
            work, lambda _: guard.interrupt(), lambda function: self._in_thread(guard, function)
        )
        self._finish(work, outcome)

    async def _run_isolated(self, work: Work) -> None:
        assert self._children is not None
        children = self._children

        def starts(work: Work) -> None:
            self._note_started([work])
            self._limit_time(work)

        if not self._executor.has_middleware:
            outcome = await children.run(work, starts, self._report)
        else:
            outcome = await self._executor.around(work, lambda: children.run(work, starts, self._report))
        self._finish(work, outcome)

    def _run_in_thread(self, work: Work) -> None:
        self._limit_time(work)
        self._threads.submit(lambda: self._thread_job(work))

    def _thread_job(self, work: Work) -> None:
        guard = Interruptible()
        outcome: list[Outcome] = []
        begin = time.monotonic()
        try:
            guard.run(lambda: outcome.append(self._executor.call(work, lambda _: guard.interrupt())))
        except Interrupted:
            logger.debug("%s was interrupted at its very end", work.delivery.message.id)
        self._settler.add(work, outcome[0] if outcome else work.interrupted())
        self._left.append(time.monotonic() - begin)
        self._schedule()

    async def _in_thread(self, guard: Interruptible, function: Callable[[], Any]) -> Any:
        done: asyncio.Future[Any] = self._loop.create_future()

        def job() -> None:
            try:
                values: list[Any] = []
                guard.run(lambda: values.append(function()))
                self._loop.call_soon_threadsafe(_resolve, done, values[0], None)
            except BaseException as error:
                self._loop.call_soon_threadsafe(_resolve, done, None, error)

        self._threads.submit(job)
        # The thread cannot be abandoned: whatever cancels this, the slot and the lease are kept until it ends.
        cancelled: asyncio.CancelledError | None = None
        while not done.done():
            try:
                await asyncio.wait([done])
            except asyncio.CancelledError as error:
                cancelled = error
                guard.interrupt()
        if cancelled is not None:
            raise cancelled
        return done.result()

    def _cancel(self, work: Work) -> None:
        """Cancel the task of an async handler. From any thread."""
        task = self._tasks.get(work)
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)

    def _limit_time(self, work: Work) -> None:
        if work.handler.options.timeout is not None:
            self._watch(work)

    def _finish(self, work: Work, outcome: Outcome) -> None:
        del self._tasks[work]
        self._settler.add(work, outcome)
        self._vacate(time.time() - work.started_at if work.started_at else 0.0)
        # The loop is not stuck, even if nothing waits for this slot any more: else nothing would be fetched for it.
        self.turns += 1
        if not self._scheduled and self._inbox:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _vacate(self, took: float) -> None:
        self.running -= 1
        self._pace.spent += took
        self._pace.finished += 1


def _resolve(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
