"""A child process that runs one handler at a time; it may crash or be killed, and only it."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from postroom.broker.base import Delivery, Outcome
from postroom.message import Progress
from postroom.worker import wire
from postroom.worker.execute import Executor
from postroom.worker.source import Source
from postroom.worker.work import Work

if TYPE_CHECKING:
    from postroom.app import App


def main(connection: Connection, module: str, variable: str) -> None:
    """The entry of the process: ``module:variable`` is the app."""
    # Ctrl-C goes to the whole process group; the worker decides what becomes of its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests: asyncio.Queue[wire.Request | None] = asyncio.Queue()
    with asyncio.Runner() as runner:
        # From the first moment on: the worker may die while the app is imported.
        threading.Thread(target=_read, args=(connection, runner.get_loop(), requests), daemon=True).start()
        app: App = getattr(sys.modules.get(module) or importlib.import_module(module), variable)
        runner.run(_serve(app, connection, requests))


async def _serve(app: App, connection: Connection, requests: asyncio.Queue[wire.Request | None]) -> None:
    replies = _Replies(connection)
    replies.send(wire.READY)
    # A spare child may wait for ever: it should not hold what the app opens, such as connections.
    await requests.get()
    async with AsyncExitStack() as stack:
        resources = await app.lifecycle.open(stack)
        # Middleware runs in the worker, around the whole of this.
        executor = Executor(resources, [], app.blobs, app.max_message_size)
        replies.send(wire.READY)
        while True:
            request = await requests.get()
            replies.send(wire.READY if request is None else await _run(app, executor, replies, request))


def _read(
    connection: Connection, loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[wire.Request | None]
) -> None:
    """Takes requests; ends the process when the worker has gone, whatever the handler is doing."""
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        loop.call_soon_threadsafe(requests.put_nowait, wire.decode_request(data))


async def _run(app: App, executor: Executor, replies: _Replies, request: wire.Request) -> Outcome:
    delivery = Delivery(message=request.message, subscription=request.subscription, attempt=request.attempt)
    handler = app.topology.handler(request.subscription, request.message.name)
    if handler is None:
        raise LookupError(f"the app in the child process has no handler for {request.message.name!r}")
    handler.compile()
    work = Work(delivery, handler, _NO_SOURCE, 0.0, lambda _, progress: replies.send(progress))
    if handler.is_async:
        return await executor.acall(work, None)
    # As in a worker, not on the event loop: Django's ORM refuses to work there, and asyncio.run() in a handler fails.
    return await asyncio.to_thread(executor.call, work, None)


class _Replies:
    """To the worker; from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, reply: Outcome | Progress | str) -> None:
        # A long one is written in parts: what a thread of the handler tells meanwhile must not come in between.
        with self._lock:
            self._connection.send_bytes(wire.encode_reply(reply))


_NO_SOURCE: Source = None  # type: ignore[assignment]  # settled by the worker, from which the child knows no source
