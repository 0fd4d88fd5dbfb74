"""A TCP proxy that does harm: it refuses, cuts, swallows answers, or stands still."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Proxy:
    """Between a client and a server on the loopback interface. Its switches may be set from any thread, at any time."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.refusing = False
        """New connections are closed at once."""
        self.silent = False
        """Requests reach the server, its answers are held back: half-open, as after a network failure."""
        self.lose_replies = 0
        """So many answers of the server are thrown away, and their connections cut."""
        self.cut_on: bytes | None = None
        """A request that contains these bytes does not reach the server; its connection is cut."""
        self.requests = 0
        """Pieces of requests that have come in."""

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._writers) // 2

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """Break all connections there are."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            upstream, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server}
        try:
            await asyncio.gather(self._requests(reader, server), self._replies(upstream, writer))
        except OSError:
            pass  # One side broke; the other is told by the abort below.
        finally:
            for end in (writer, server):
                end.transport.abort()
                self._writers.discard(end)

    async def _requests(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            self.requests += 1
            if self.cut_on is not None and self.cut_on in data:
                raise ConnectionResetError
            server.write(data)
            await server.drain()
        raise ConnectionResetError

    async def _replies(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await upstream.read(65_536):
            if self.lose_replies:
                self.lose_replies -= 1
                raise ConnectionResetError
            while self.silent:  # noqa: ASYNC110 -- set from another thread
                await asyncio.sleep(0.02)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    made = Proxy(port)
    made.start()
    try:
        yield made
    finally:
        made.stop()
