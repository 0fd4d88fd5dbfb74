"""The one thread of a process that talks to its broker.

Producers in any thread or event loop, operators and the worker share one connection, whose event loop
runs in a thread of its own: a handler that blocks its own loop cannot stop the renewal of leases.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from postroom.broker.base import Broker
from postroom.errors import BrokerClosed

T = TypeVar("T")

_threads: weakref.WeakSet[BrokerThread] = weakref.WeakSet()
_inherited: list[object] = []


class BrokerThread:
    """Connects at first use, in a daemon thread named ``postroom-broker``; starts anew in a forked child."""

    def __init__(self, make_broker: Callable[[], Broker], prepare: Callable[[Broker], Awaitable[None]]) -> None:
        """``prepare`` declares the topology; it runs once connected, and again when ``prepare_again`` was called."""
        self._make_broker = make_broker
        self._prepare = prepare
        _threads.add(self)
        self._reset()

    def _reset(self) -> None:
        self._mutex = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._broker: Broker | None = None
        self._connecting: asyncio.Lock | None = None
        self._topology = 1
        self._declared = 0
        self._closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The thread's event loop, started if need be. Raises ``BrokerClosed``."""
        if self._loop is None:
            with self._mutex:
                if self._closed:
                    raise BrokerClosed("the app was closed; make a new App")
                if self._loop is None:
                    self._start()
        assert self._loop is not None
        return self._loop

    @property
    def prepared(self) -> bool:
        """Whether the broker is connected and knows the whole topology."""
        return self._broker is not None and self._declared == self._topology

    def prepare_again(self) -> None:
        """The topology has grown: declare it before the next operation."""
        self._topology += 1

    async def broker(self) -> Broker:
        """The connected broker with its topology declared. To be awaited on this thread's loop."""
        if self._broker is not None and self._declared == self._topology:
            return self._broker
        assert self._connecting is not None
        async with self._connecting:
            if self._broker is None:
                broker = self._make_broker()
                await broker.connect()
                self._broker = broker
            if self._declared != self._topology:
                # It may grow while it is being declared.
                topology = self._topology
                await self._prepare(self._broker)
                self._declared = topology
        return self._broker

    def submit(self, operation: Callable[[Broker], Awaitable[T]]) -> Future[T]:
        """Run ``operation(broker)`` on the thread's loop."""
        return asyncio.run_coroutine_threadsafe(self._run(operation), self.loop)

    def call(self, operation: Callable[[Broker], Awaitable[T]]) -> T:
        """Run ``operation(broker)`` and wait for it; not to be used on the thread's own loop."""
        return self.submit(operation).result()

    async def acall(self, operation: Callable[[Broker], Awaitable[T]]) -> T:
        """Run ``operation(broker)`` from any event loop."""
        if self._loop is not None and asyncio.get_running_loop() is self._loop:
            return await self._run(operation)
        return await asyncio.wrap_future(self.submit(operation))

    def close(self) -> None:
        """Close the broker and end the thread. A second call does nothing."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._disconnect(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _run(self, operation: Callable[[Broker], Awaitable[T]]) -> T:
        return await operation(await self.broker())

    async def _disconnect(self) -> None:
        if self._broker is not None:
            await self._broker.close()
        # Whoever still waits for an answer is told BrokerClosed now, rather than never.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, pending = await asyncio.wait(others, timeout=5.0)
            for task in pending:
                task.cancel()

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        self._connecting = asyncio.Lock()
        self._thread = threading.Thread(target=self._main, args=(loop,), name="postroom-broker", daemon=True)
        self._thread.start()
        self._loop = loop

    @staticmethod
    def _main(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()

    def after_fork(self) -> None:
        """In a forked child the thread is gone and the connection belongs to the parent: leave both alone."""
        _inherited.append((self._loop, self._broker))
        self._reset()


def _after_fork_in_child() -> Any:
    for thread in list(_threads):
        thread.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
