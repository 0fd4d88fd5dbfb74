"""A worker process from start to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from postroom.broker.base import Broker
from postroom.errors import ConfigurationError
from postroom.handler import TaskHandler, module_of
from postroom.worker.execute import Executor
from postroom.worker.intake import Intake
from postroom.worker.isolation import ChildPool
from postroom.worker.relay import relaying
from postroom.worker.run import Runner
from postroom.worker.supervise import SUPERVISOR
from postroom.worker.threads import ThreadPool
from postroom.worker.work import Work

if TYPE_CHECKING:
    from postroom.app import App

T = TypeVar("T")

logger = logging.getLogger("postroom.worker")

_PARENT_CHECK = 1.0
_SWITCH_INTERVAL = 0.001
_GARBAGE_THRESHOLD = 20_000
"""New objects after which the collector looks for cycles; Python's own is 700."""
_SPARE_AFTER = 1.0
"""Seconds after which a spare child is started: it takes as much CPU as the start of the worker, and would delay its
first messages."""
_LAST_SETTLE = 5.0
"""Seconds for the last settles when stopping."""
_INTERRUPT_PATIENCE = 2.0
"""Seconds for interrupted handlers to clean up."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How one worker process runs. Raises ``ConfigurationError``."""

    concurrency: int = 50
    """Handlers that run at once."""
    queues: Sequence[str] | None = None
    """Queues and subscriptions to work on; ``None``: all of the app."""
    drain: bool = False
    """Stop once nothing is ready or running. What is scheduled for later stays."""
    grace: float = 30.0
    """Seconds that running handlers have to finish after the signal to stop."""
    relay: str | None = None
    """URL of a database whose outbox this process also relays to the broker; see ``postroom outbox relay``."""
    spare: bool = True
    """Keep a child process ready, the app imported, so that what a dead worker had started runs again at once."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigurationError(f"concurrency={self.concurrency}: at least 1")
        if self.grace < 0:
            raise ConfigurationError(f"grace={self.grace}: seconds, at least 0")
        if self.relay is not None and self.drain:
            raise ConfigurationError(
                "a worker that drains its queues does not see what still lies in an outbox: run `postroom outbox relay "
                "--drain` before"
            )


def run(app: App, options: WorkerOptions) -> None:
    """Run a worker in the main thread until a signal, or until drained. Raises ``ConfigurationError``."""
    # A handler that burns CPU in a thread or on the loop would otherwise hold the interpreter for 5 ms at each of
    # the broker thread's turns, while a transaction is open.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _collect_garbage_less_often()
    asyncio.run(Worker(app, options).run())


def _collect_garbage_less_often() -> None:
    # Each message in flight is some ten objects that the collector would look through again and again in vain, as no
    # cycle holds them: at Python's own pace that takes a sixth of the CPU of a quick job.
    first, *others = gc.get_threshold()
    if 0 < first < _GARBAGE_THRESHOLD:
        gc.set_threshold(_GARBAGE_THRESHOLD, *others)


class Worker:
    """start → (fetch → run → settle)* → stop."""

    def __init__(self, app: App, options: WorkerOptions) -> None:
        self._app = app
        self._options = options
        self._failure: BaseException | None = None
        self.ready = False
        """Whether it takes messages, or has done so."""

    async def run(self) -> None:
        """Until :meth:`stop`, a signal, or drained. A second signal ends at once, releasing everything."""
        app, options = self._app, self._options
        app.check()
        names = app.topology.select(options.queues)
        if not names:
            raise ConfigurationError("the app has no tasks and no subscriptions; there is nothing to work on")
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listen_for_signals()
        children = self._children(names)
        async with AsyncExitStack() as stack:
            resources = await app.lifecycle.open(stack)
            if options.relay is not None:
                # Entered before the intake: what it sends while the worker stops is for others.
                stack.enter_context(relaying(options.relay, app.outlet.send, self._failed))
            self._intake = await app.thread.acall(
                lambda broker: Intake.open(broker, app.topology, names, options.concurrency)
            )
            self._runner = self._make_runner(Executor(
                resources, app.lifecycle.middleware, app.blobs, app.max_message_size
            ), children)  # fmt: skip
            await self._on_broker_thread(self._begin)
            self.ready = True
            if children is not None:
                self._loop.call_later(_SPARE_AFTER, children.prepare)
            orphaned = asyncio.ensure_future(self._stop_when_orphaned())
            logger.info("worker %d works on %s", os.getpid(), ", ".join(names))
            await self._stopping.wait()
            orphaned.cancel()
            await self._stop(children)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop gracefully; the second time at once. From any thread."""
        self._loop.call_soon_threadsafe(self._signalled)

    def _make_runner(self, executor: Executor, children: ChildPool | None) -> Runner:
        intake = self._intake
        return Runner(
            concurrency=self._options.concurrency,
            executor=executor,
            children=children,
            settler=intake.settler,
            pace=intake.pace,
            watch=intake.watch,
            report=intake.reporter.report,
            threads=self._make_threads(),
        )

    def _make_threads(self) -> ThreadPool:
        """For sync handlers."""
        return ThreadPool(self._options.concurrency)

    async def _begin(self) -> None:
        if self._options.drain:
            self._intake.fetcher.when_idle(lambda: self._loop.call_soon_threadsafe(self._stopping.set))
        self._intake.start(self._runner, self._app.blobs, self._failed, self._ended)

    async def _stop(self, children: ChildPool | None) -> None:
        logger.info("worker %d stops; %d handlers run", os.getpid(), self._runner.running)
        await self._on_broker_thread(self._intake.stop_fetching)
        await self._finish_within(self._options.grace)
        if self._runner.running:
            await self._on_broker_thread(self._interrupt_all)
            await self._finish_within(_INTERRUPT_PATIENCE)
        if self._runner.running:
            logger.warning("%d handlers did not stop; their messages are released", self._runner.running)
        await self._on_broker_thread(lambda: self._intake.close(_LAST_SETTLE))
        self._runner.close()
        if children is not None:
            await children.close()

    async def _interrupt_all(self) -> None:
        self._intake.interrupt_all()

    async def _finish_within(self, seconds: float) -> None:
        """Wait for running handlers, at most so long, or until a second signal."""
        idle = asyncio.ensure_future(self._runner.idle())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait([idle, hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()
        await asyncio.gather(idle, hurry, return_exceptions=True)

    async def _on_broker_thread(self, operation: Callable[[], Awaitable[T]]) -> T:
        async def run(broker: Broker) -> T:
            return await operation()

        return await self._app.thread.acall(run)

    def _children(self, names: Sequence[str]) -> ChildPool | None:
        """The pool for isolated handlers and suspects, if a fresh process can import the app."""
        handlers = [handler for name in names for handler in self._app.topology.handlers(name)]
        found = (module_of(self._app, handler.function.__module__) for handler in handlers)
        place = next((place for place in found if place is not None), None)
        if place is not None:
            module, _, variable = place.partition(":")
            # A worker that drains does not stay to take over what others leave.
            spare = self._options.spare and not self._options.drain
            return ChildPool(module, variable, max(2, os.cpu_count() or 1), spare=spare)
        isolated = [handler for handler in handlers if handler.options.isolation is not None]
        if isolated:
            raise ConfigurationError(
                f"{isolated[0].label} has isolation='process', but a fresh process could not import the app: "
                "make the App at the top level of the module that defines the tasks"
            )
        return None

    def _listen_for_signals(self) -> None:
        if threading.current_thread() is threading.main_thread() and os.name != "nt":
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _stop_when_orphaned(self) -> None:
        """A supervisor that was killed can pass no signal on: its children would run on unseen."""
        supervisor = os.environ.get(SUPERVISOR)
        while supervisor is not None and str(os.getppid()) == supervisor:  # noqa: ASYNC110 -- nothing can signal it
            await asyncio.sleep(_PARENT_CHECK)
        if supervisor is not None:
            logger.warning("worker %d: its supervisor is gone", os.getpid())
            self._stopping.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self._loop.call_soon_threadsafe(self._stopping.set)

    def _ended(self, works: list[Work]) -> None:
        for work in works:
            handler = work.handler
            if isinstance(handler, TaskHandler) and handler.uploads:
                # Off the broker's loop: deleting files can wait for a disk.
                asyncio.get_running_loop().run_in_executor(None, self._app.blobs.remove, work.delivery.message.id)
