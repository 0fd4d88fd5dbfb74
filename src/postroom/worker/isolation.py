"""Handlers in processes of their own: those that ask for it, and suspects."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from postroom.broker.base import Outcome, Release
from postroom.message import Progress
from postroom.worker import child, decide, wire
from postroom.worker.work import Work

logger = logging.getLogger("postroom.worker")

_spawn = multiprocessing.get_context("spawn")

ANSWER_TIMEOUT = 60.0
"""Seconds a child may take to import the app, and again to answer, with its resources open, before each work."""
BROKEN_START_DELAY = 5.0
"""Seconds before a message is tried again that no child could be started for."""


class ChildLost(Exception):
    """The child process ended without an answer."""


class Child:
    """One process; runs one work at a time."""

    def __init__(self, module: str, variable: str) -> None:
        self._connection, theirs = _spawn.Pipe()
        self._process: BaseProcess = _spawn.Process(
            target=child.main, args=(theirs, module, variable), name="postroom-isolated", daemon=True
        )
        self._theirs = theirs

    async def start(self) -> None:
        """Have it import the app. Raises ``ChildLost`` if it does not come up."""
        try:
            await asyncio.to_thread(self._process.start)
        except OSError as error:
            # As many processes, or as much memory, as the system allows: its message must not be held for ever.
            raise ChildLost(f"the system starts no process: {error}") from error
        finally:
            # Our copy must go, or the end of the process would not end the stream.
            self._theirs.close()
        await self._ready()

    async def ask(self) -> None:
        """Return once it answers; the first time, with the app's resources opened. Raises ``ChildLost``.

        The system may still call a process alive that has been killed and is ending.
        """
        self._send(None)
        await self._ready()

    async def run(self, work: Work, progress: Callable[[Progress], None]) -> Outcome:
        """Raises ``ChildLost`` if the process ends before it has answered."""
        delivery = work.delivery
        self._send(wire.Request(delivery.message, delivery.subscription, delivery.attempt))
        while True:
            reply = await self._receive()
            if not isinstance(reply, Progress | str):
                return reply
            if isinstance(reply, Progress):
                progress(reply)

    def kill(self) -> None:
        """End the process, without waiting."""
        self._process.kill()

    def close(self) -> None:
        """End the process and forget it."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _send(self, request: wire.Request | None) -> None:
        try:
            self._connection.send_bytes(wire.encode_request(request))
        except OSError as error:
            raise ChildLost(self._how_it_ended()) from error

    async def _ready(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                # What a thread that the last handler left behind has told belongs to no work.
                while await self._receive() != wire.READY:
                    pass
        except TimeoutError as error:
            raise ChildLost(f"did not answer within {ANSWER_TIMEOUT} s") from error

    async def _receive(self) -> Outcome | Progress | str:
        await self._readable()
        try:
            return wire.decode_reply(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ChildLost(self._how_it_ended()) from error

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        descriptor = self._connection.fileno()
        loop.add_reader(descriptor, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)

    def _how_it_ended(self) -> str:
        self._process.join(5.0)
        code = self._process.exitcode
        if code is None:
            return "the process that ran the handler closed its connection"
        if code < 0:
            return f"the process that ran the handler was ended by {signal.Signals(-code).name}"
        return f"the process that ran the handler ended with exit code {code}"


class ChildPool:
    """Up to ``limit`` children, started as they are needed and used again."""

    def __init__(self, module: str, variable: str, limit: int, *, spare: bool) -> None:
        """``spare``: a child is kept ready, so that what comes back from a dead worker runs at once."""
        self._module, self._variable = module, variable
        self._idle: list[Child] = []
        self._all: set[Child] = set()
        self._slots = asyncio.Semaphore(limit)
        self._suspects = asyncio.Semaphore(1)
        self._keeps_spare = spare
        self._spare: asyncio.Task[Child | None] | None = None

    def prepare(self) -> None:
        """Start the spare child, unless one is there or none is to be kept."""
        if self._keeps_spare and not self._idle and self._spare is None:
            self._spare = asyncio.get_running_loop().create_task(self._prepared())

    async def run(
        self, work: Work, starts: Callable[[Work], None], report: Callable[[Work, Progress], None]
    ) -> Outcome:
        """One attempt in a child. ``starts`` is called when a child is there for it."""
        if not work.delivery.suspect:
            return await self._run(work, starts, report)
        # One at a time: if several could have killed their process, each must be seen alone.
        async with self._suspects:
            return await self._run(work, starts, report)

    async def close(self) -> None:
        """Kill all children."""
        self._keeps_spare = False
        if self._spare is not None:
            self._spare.cancel()
            await asyncio.wait([self._spare])
        for process in list(self._all):
            self._discard(process)

    async def _run(
        self, work: Work, starts: Callable[[Work], None], report: Callable[[Work, Progress], None]
    ) -> Outcome:
        async with self._slots:
            try:
                process = await self._take()
            except ChildLost as error:
                logger.error("cannot start a child process for %s: %s", work.handler.label, error)
                return Release(BROKEN_START_DELAY)
            if work.why is not None:
                self._idle.append(process)
                return work.interrupted()
            starts(work)
            work.start(lambda _: process.kill())
            try:
                outcome = await process.run(work, lambda progress: report(work, progress))
            except ChildLost as error:
                self._replace(process)
                if work.why is not None:
                    return work.interrupted()
                return decide.lost(work.delivery, work.handler.options.retry, work.started_at, str(error))
            if work.ends():
                self._idle.append(process)
            else:
                # It answered just as it was being ended: the process is dead or dying.
                self._replace(process)
            return outcome

    async def _take(self) -> Child:
        """A child that can run something now. Raises ``ChildLost``."""
        while (process := await self._waiting()) is not None:
            try:
                return await self._answering(process)
            except ChildLost as error:
                # It died without work, so no message is to blame.
                logger.warning("a child process that waited for work is lost: %s", error)
        return await self._answering(await self._start())

    async def _waiting(self) -> Child | None:
        if not self._idle and self._spare is not None:
            spare, self._spare = self._spare, None
            return await spare
        return self._idle.pop() if self._idle else None

    async def _answering(self, process: Child) -> Child:
        try:
            await process.ask()
        except BaseException:
            self._discard(process)
            raise
        return process

    async def _prepared(self) -> Child | None:
        try:
            return await self._start()
        except ChildLost as error:
            logger.error("cannot keep a child process ready: %s", error)
            return None

    async def _start(self) -> Child:
        try:
            process = Child(self._module, self._variable)
        except OSError as error:
            raise ChildLost(f"the system gives no pipe: {error}") from error
        self._all.add(process)
        try:
            await process.start()
        except BaseException:
            self._discard(process)
            raise
        return process

    def _replace(self, process: Child) -> None:
        self._discard(process)
        self.prepare()

    def _discard(self, process: Child) -> None:
        self._all.discard(process)
        process.close()


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
