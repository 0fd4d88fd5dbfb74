"""One thread's event loop in a simulated process: first come, first served, as in asyncio's own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postroom.testing.simulation.machine import Machine, Process

_UNWINDING = 50
"""Awaits in ``finally`` blocks after which a coroutine that will not end is let go."""


class Lane(asyncio.AbstractEventLoop):
    """Holds what is ready; the machine decides whose turn it is. In a dead process nothing becomes ready any more."""

    def __init__(self, machine: Machine, process: Process, name: str) -> None:
        self.machine = machine
        self.process = process
        self.name = f"{process.name}/{name}"
        self.ready: deque[asyncio.Handle] = deque()
        self.readers: dict[int, asyncio.Handle] = {}
        self.signals: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self.blocked = False
        """Its thread waits for another one's answer."""
        self._tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self.machine.monotonic

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.process.dead

    def is_closed(self) -> bool:
        return self.process.dead

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        if not self.process.dead:
            self.ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self.machine.add_timer(timer, self)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """The machine passes over it when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        # Tasks of a dead process must not be collected while others live: their ``finally`` blocks would run.
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """One step, later."""
        future = self.create_future()

        def run() -> None:
            try:
                value = func(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        self.call_soon(run)
        return future

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        self.readers[fd] = asyncio.Handle(callback, args, self)
        self.machine.watch(fd, self)

    def remove_reader(self, fd: Any) -> bool:
        self.machine.unwatch(fd)
        handle = self.readers.pop(fd, None)
        if handle is not None:
            handle.cancel()
        return handle is not None

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        self.signals[sig] = (callback, args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.machine.complain(self.process, context)

    def bury(self) -> None:
        """Let what never ended go, silently."""
        for task in self._tasks:
            if not task.done():
                _unwind(task)
        self._tasks.clear()
        self.ready.clear()


def _unwind(task: asyncio.Task[Any]) -> None:
    coroutine: Any = task.get_coro()
    for _ in range(_UNWINDING):
        try:
            coroutine.close()
            return
        except RuntimeError:
            continue  # It waits for something in a ``finally`` block.
        except BaseException:  # What the dead have to say changes nothing.
            return
