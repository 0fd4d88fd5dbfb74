"""Child processes of a simulated worker: for isolated handlers, and for suspects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from postroom.broker.base import Outcome
from postroom.message import Progress
from postroom.testing.simulation.app import SimulatedApp
from postroom.worker import child, wire
from postroom.worker.execute import Executor
from postroom.worker.isolation import Child, ChildLost, ChildPool
from postroom.worker.work import Work

_START_TIME = 0.05
_LIMIT = 2


class SimulatedChildren(ChildPool):
    """The pool, but for how a child is started."""

    def __init__(self, app: SimulatedApp) -> None:
        super().__init__("", "", _LIMIT, spare=True)
        self._app = app

    async def _start(self) -> Child:
        process = SimulatedChild(self._app)
        self._all.add(process)
        try:
            await process.start()
        except BaseException:
            self._discard(process)
            raise
        return process


class SimulatedChild(Child):
    """Dies with its worker; the worker sees it die, and what is said to a dead one is not heard."""

    def __init__(self, parent: SimulatedApp) -> None:
        self._imported = parent
        self._parent = parent.process
        machine = parent.process.machine
        self._child = machine.spawn(f"child.{len(machine.everyone)}")
        # What befalls the worker, that keeps the lease, befalls what runs here.
        self._child.troubles = self._parent.troubles
        self._ended = asyncio.Event()
        self._parent.closers.append(self.kill)
        self._child.closers.append(self._mourn)

    @cached_property
    def _app(self) -> SimulatedApp:
        """Made only for those that are to run something."""
        return self._imported.made_for(self._child)

    async def start(self) -> None:
        await asyncio.sleep(_START_TIME)
        if self._child.dead:
            raise ChildLost("simulated: died at its start")

    async def ask(self) -> None:
        """There are no resources to open."""
        if self._child.dead:
            raise ChildLost("simulated: died while it waited for work")

    async def run(self, work: Work, progress: Callable[[Progress], None]) -> Outcome:
        delivery = work.delivery
        request = wire.Request(delivery.message, delivery.subscription, delivery.attempt)
        answer: asyncio.Future[Outcome] = self._parent.main.create_future()
        if not self._child.dead:
            self._child.main.create_task(self._serve(request, answer, progress))
        ended = asyncio.ensure_future(self._ended.wait())
        waits: list[asyncio.Future[Any]] = [answer, ended]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not answer.done():
            raise ChildLost("simulated: the process that ran the handler died")
        return answer.result()

    def kill(self) -> None:
        self._parent.machine.kill(self._child, "is ended by its worker")

    def close(self) -> None:
        self.kill()

    async def _serve(
        self, request: wire.Request, answer: asyncio.Future[Outcome], progress: Callable[[Progress], None]
    ) -> None:
        def reply(told: bytes) -> None:
            if self._child.dead:
                return
            value: Any = wire.decode_reply(told)
            self._parent.main.call_soon(progress if isinstance(value, Progress) else answer.set_result, value)

        app = self._app
        replies = child._Replies(SimpleNamespace(send_bytes=reply))  # type: ignore[arg-type]
        executor = Executor({}, [], app.blobs, app.max_message_size)
        replies.send(await child._run(app, executor, replies, request))

    def _mourn(self) -> None:
        self._imported.observed.ended(self._child.name, self._child.machine.monotonic)
        self._parent.main.call_soon(self._ended.set)
