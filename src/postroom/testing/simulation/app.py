"""The app whose handlers run in the simulated processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from postroom.app import App
from postroom.broker.base import Broker
from postroom.broker.thread import BrokerThread, T
from postroom.config import RetryPolicy, exponential
from postroom.context import Context
from postroom.signals import Snooze
from postroom.testing.simulation.bank import Bank
from postroom.testing.simulation.lane import Lane
from postroom.testing.simulation.machine import Died, Process
from postroom.testing.simulation.observed import Observed, Run

LEASE = 1.5
RETRY = RetryPolicy(max_attempts=5, backoff=exponential(first=0.1, factor=2.0, max=0.5))
NAP = 0.1

_compiled: dict[str, dict[str, Any]] = {}


class SimulatedThread(BrokerThread):
    """One more lane of its process."""

    def _start(self) -> None:
        lane = asyncio.get_running_loop()
        assert isinstance(lane, Lane)
        self._connecting = asyncio.Lock()
        self._loop = lane.process.add_lane("broker")

    def call(self, operation: Callable[[Broker], Awaitable[T]]) -> T:
        lane = self.loop
        assert isinstance(lane, Lane)
        return lane.machine.wait(self.submit(operation))


class SimulatedApp(App):
    """An app in a simulated process, with the tasks and subscriptions that every run uses."""

    thread_class: ClassVar[type[BrokerThread]] = SimulatedThread
    has_children: ClassVar[bool] = True
    """Whether its workers run suspects apart."""

    def __init__(self, process: Process, connect: Callable[[Process], Broker], bank: Bank, observed: Observed) -> None:
        self.process = process
        self._connect = connect
        self.bank = bank
        self.observed = observed
        super().__init__("memory://")
        self._define()
        self._compile()

    def made_for(self, process: Process) -> SimulatedApp:
        """The same app, imported by another process."""
        return type(self)(process, self._connect, self.bank, self.observed)

    def make_broker(self) -> Broker:
        return self._connect(self.process)

    def _define(self) -> None:
        self.topic("paid")
        common: dict[str, Any] = {"retry": RETRY, "lease": LEASE}
        self.task(name="transfer", queue="payments", **common)(self._transfer)
        self.task(name="slow", queue="payments", **common)(self._slow)
        self.task(name="ordered", queue="ordered", ordered=True, **common)(self._ordered)
        self.task(name="flaky", queue="work", **common)(self._flaky)
        self.task(name="poison", queue="broken", **common)(self._poison)
        self.task(name="killer", queue="payments", **common)(self._killer)
        self.task(name="apart", queue="payments", isolation="process", **common)(self._transfer)
        self.task(name="brief", queue="payments", **common)(self._brief)
        self.task(name="sleepy", queue="work", **common)(self._sleepy)
        self.task(name="single", queue="work", **common)(self._single)
        self.task(name="latest", queue="work", **common)(self._latest)
        self.subscribe("paid", "audit", **common)(self._audit)
        self.subscribe("paid", "mail", **common)(self._mail)
        self.subscribe("paid", "europe", where={"region": "eu"}, **common)(self._europe)

    def _compile(self) -> None:
        """Once for all processes: it takes longer than all the rest of a short life."""
        for handler in (*self.topology.tasks.values(), *self.topology.events.values()):
            if handler.name not in _compiled:
                handler.compile()
                _compiled[handler.name] = vars(handler).copy()
            vars(handler).update({**_compiled[handler.name], "function": handler.function})

    # Handlers

    async def _transfer(self, label: str, amount: int, ctx: Context) -> int:
        with self._running(label, ctx):
            await self._pay(label, amount, ctx)
            await asyncio.sleep(0)
        return amount

    async def _slow(self, label: str, amount: int, ctx: Context) -> None:
        """Longer than its lease."""
        with self._running(label, ctx):
            await asyncio.sleep(LEASE)
            ctx.progress(0.5)
            await asyncio.sleep(LEASE * 1.2)
            await self._pay(label, amount, ctx)

    async def _ordered(self, label: str, amount: int, fails: int, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.01)
            if ctx.attempt <= fails:
                raise RuntimeError("not yet")
            await self._pay(label, amount, ctx)

    def _flaky(self, label: str, fails: int, ctx: Context) -> None:
        with self._running(label, ctx):
            if ctx.attempt <= fails:
                raise RuntimeError("not yet")

    async def _poison(self, label: str, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.01)
            if label not in self.observed.mended:
                raise RuntimeError("never")

    async def _killer(self, label: str, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.02)
            self.process.machine.kill(self.process, f"is killed by {label}")
            raise Died

    async def _brief(self, label: str, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.01)

    async def _sleepy(self, label: str, naps: int, ctx: Context) -> None:
        with self._running(label, ctx):
            if sum(run.label == label for run in self.observed.runs) <= naps:
                raise Snooze(NAP)

    async def _single(self, label: str, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.3)

    async def _latest(self, label: str, ctx: Context) -> None:
        with self._running(label, ctx):
            await asyncio.sleep(0.1)

    async def _audit(self, event: dict[str, str], ctx: Context) -> None:
        with self._running(event["label"], ctx):
            await asyncio.sleep(0.005)

    async def _mail(self, event: dict[str, str], ctx: Context) -> None:
        with self._running(event["label"], ctx):
            await asyncio.sleep(0.3)

    def _europe(self, event: dict[str, str], ctx: Context) -> None:
        with self._running(event["label"], ctx):
            assert event["region"] == "eu"

    async def _pay(self, label: str, amount: int, ctx: Context) -> None:
        async with self.bank.transaction() as connection:
            self._mark(ctx, connection)
            await asyncio.sleep(0)
            self.bank.move(connection, label, amount)
            await asyncio.sleep(0)
            connection.execute("COMMIT")
        self.process.machine.note(self.process, f"paid {label}")

    def _mark(self, ctx: Context, connection: Any) -> None:
        ctx.once(connection)

    @contextmanager
    def _running(self, label: str, ctx: Context) -> Iterator[None]:
        process, machine = self.process, self.process.machine
        machine.note(process, f"runs {label} in {ctx.subscription} (attempt {ctx.attempt})")
        run = Run(
            label=label,
            id=ctx.job_id,
            subscription=ctx.subscription,
            attempt=ctx.attempt,
            process=process.name,
            started=machine.monotonic,
        )
        self.observed.runs.append(run)
        machine.faults.expose(process)
        try:
            yield
        finally:
            if run.ended is None:
                run.ended = machine.monotonic
