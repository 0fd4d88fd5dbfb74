"""One run: processes that start, die and start again, and in the end everything done."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from postroom.broker.base import Broker
from postroom.broker.memory import MemoryBroker, forget
from postroom.broker.sqlite import SQLiteBroker
from postroom.errors import BrokerUnavailable
from postroom.store.outbox.relay import Relay
from postroom.testing.simulation import faults, plan, programs, system
from postroom.testing.simulation.app import LEASE, SimulatedApp
from postroom.testing.simulation.bank import Bank
from postroom.testing.simulation.faults import CALM_AFTER, Faults
from postroom.testing.simulation.line import Line
from postroom.testing.simulation.machine import Machine, Process, Stuck
from postroom.testing.simulation.observed import Observed, Order
from postroom.testing.simulation.trace import KEPT, Trace
from postroom.testing.simulation.verdict import violations

Kind = Literal["memory", "sqlite"]
Program = Callable[[SimulatedApp], Coroutine[Any, Any, None]]

_MAX_STEPS = 400_000
_PATIENCE = 120.0
"""Simulated seconds after the last fault within which everything must be done."""
_MEMORY = Path("/dev/shm")


class Outcome(NamedTuple):
    """What came of a run."""

    violations: list[str]
    observed: Observed
    trace: Trace
    faults: Counter[tuple[str, str]]
    """(place, kind)."""
    steps: int
    seconds: float
    """Simulated."""


class Setting(NamedTuple):
    """What the processes of a run are made of; tests of the simulation plant something wrong here."""

    app: type[SimulatedApp] = SimulatedApp
    broker: Callable[[Broker], Broker] = lambda sound: sound
    orders: Callable[[Random], list[list[Order]]] = plan.orders
    """One list a producer."""
    relay: type[Relay] = Relay
    faults: Faults | None = None
    """``None``: drawn from the seed."""
    workers: int = 2
    calm_after: float = CALM_AFTER


SOUND = Setting()


def simulate(
    seed: int, kind: Kind, *, setting: Setting = SOUND, detailed: bool = False, keep: int | None = KEPT
) -> Outcome:
    """Run the world of ``seed`` from its beginning to its end. ``detailed``: every step is in the trace."""
    trace = Trace(detailed=detailed, keep=keep)
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        trace.folder = f"{folder}/"
        return World(seed, kind, Path(folder), trace, setting).run()


class World:
    def __init__(self, seed: int, kind: Kind, folder: Path, trace: Trace, setting: Setting) -> None:
        self._kind = kind
        self._seed = f"{kind}/{seed}"
        self._folder = folder
        self._setting = setting
        random = Random(f"{self._seed}/faults")
        rates = faults.drawn(random, unknown=kind == "memory", jumps=kind == "sqlite")
        self._faults = setting.faults or Faults(random, rates, lease=LEASE)
        self._machine = Machine(self._seed, trace, self._faults, max_steps=_MAX_STEPS)
        self._faults.machine = self._machine
        self._random = Random(f"{self._seed}/world")
        self._orders = setting.orders(Random(f"{self._seed}/plan"))
        every = [order for orders in self._orders for order in orders]
        self._queues = sorted({name for order in every for name in order.subscriptions})
        # In the broker's own file a transaction publishes by itself; elsewhere it needs an outbox.
        beside = kind == "memory" or self._random.random() < 0.5
        self._relays = 2 if beside and any(order.joined for order in every) else 0
        self._bank = Bank(folder / ("bank.db" if beside else "postroom.db"))
        self._observed = Observed()
        self._alive: list[Process] = []
        self._finished: set[Process] = set()
        self._stopping = False

    def run(self) -> Outcome:
        machine, observed = self._machine, self._observed
        with system.installed(machine, self._seed), _quiet():
            director = machine.spawn("director")
            director.mortal = False
            try:
                machine.run(director, self._direct(director))
            except Stuck as error:
                observed.unexpected.append(f"stuck: {error}")
            finally:
                machine.bury()
                forget(self._url())
        observed.unexpected += machine.complaints
        observed.troubles = {process.name: process.troubles for process in machine.everyone}
        faults = self._faults.seen
        observed.strikes = faults.total()
        clock_was_set = any(kind == "jump" for _, kind in faults)
        found = violations(observed, shared_file=self._kind == "sqlite", clock_was_set=clock_was_set)
        return Outcome(found, observed, machine.trace, faults, machine.steps, machine.monotonic)

    async def _direct(self, director: Process) -> None:
        app = self._setting.app(director, self._connect, self._bank, self._observed)
        await app.aconnect()
        self._bank.create()
        every = [order for orders in self._orders for order in orders]
        self._observed.orders = {order.label: order for order in every}
        keep = partial(self._keep, director)
        busy = [
            keep(f"producer{number}", partial(programs.produce, orders=orders, random=self._draw()), ends=True)
            for number, orders in enumerate(self._orders, 1)
            if orders
        ]
        workers = range(1, self._setting.workers + 1)
        others = [keep(f"worker{number}", partial(programs.work, queues=self._queues)) for number in workers]
        others.append(keep("client", partial(programs.look, orders=every, random=self._draw())))
        if programs.BROKEN in self._queues:
            busy.append(keep("operator", partial(programs.mend, random=self._draw()), ends=True))
        relay = partial(programs.relay, relay_class=self._setting.relay, url=f"sqlite:///{self._bank.path}")
        others += [keep(f"relay{number}", relay) for number in range(1, self._relays + 1)]
        await asyncio.sleep(self._setting.calm_after)
        self._calm_down()
        await self._finish(app, busy, others)
        await self._collect(app)

    def _calm_down(self) -> None:
        self._machine.note(None, "nothing goes wrong from now on")
        self._faults.calm = True
        self._machine.thaw_all()

    async def _finish(
        self, app: SimulatedApp, busy: list[asyncio.Task[None]], others: list[asyncio.Task[None]]
    ) -> None:
        """Wait until all is published and handled, then stop everybody."""
        _, late = await asyncio.wait(busy, timeout=_PATIENCE)
        if late:
            self._observed.unexpected.append("producers or operators do not come to their end")
        deadline = self._machine.monotonic + _PATIENCE
        while left := await self._left(app):
            if self._machine.monotonic > deadline:
                self._observed.unexpected.append(f"not handled within {_PATIENCE:.0f} s: {left}")
                break
            await asyncio.sleep(0.5)
        self._stopping = True
        for process in list(self._alive):
            self._machine.terminate(process)
        _, late = await asyncio.wait(others, timeout=3 * programs.GRACE)
        if late:
            self._observed.unexpected.append(f"do not stop: {[process.name for process in self._alive]}")

    async def _left(self, app: SimulatedApp) -> list[object]:
        """What waits in an outbox, or is not handled."""
        # In this order: what has left the one is seen in the other.
        waiting = self._bank.waiting()
        stats = [stats for stats in await app.astats() if stats.ready + stats.delayed + stats.running]
        return [*stats, *([f"{waiting} in the outbox"] if waiting else [])]

    async def _collect(self, app: SimulatedApp) -> None:
        observed = self._observed

        async def read(broker: Broker) -> None:
            for stats in await broker.stats():
                for record in await broker.jobs.search(subscription=stats.name, limit=1_000):
                    observed.records[record.id, stats.name] = record
                for letter in await broker.dead_letters(stats.name, limit=1_000):
                    observed.letters[letter.message.id, stats.name] = letter

        await app.thread.acall(read)
        observed.balances, observed.ledger, observed.kept = self._bank.read()

    def _keep(self, director: Process, name: str, program: Program, *, ends: bool = False) -> asyncio.Task[None]:
        """Run ``program`` in a process, and in another one when that has died. ``ends``: it may end by itself."""
        return director.main.create_task(self._keep_alive(director, name, program, ends))

    async def _keep_alive(self, director: Process, name: str, program: Program, ends: bool) -> None:
        life, done = 0, False
        while not done and not self._stopping:
            life += 1
            process = self._machine.spawn(f"{name}.{life}")
            ended = asyncio.Event()
            process.closers.append(partial(self._mourn, director, process, ended))
            self._alive.append(process)
            process.main.create_task(self._live(process, program))
            await ended.wait()
            self._alive.remove(process)
            # A worker or a relay that was told to stop, is started anew.
            done = ends and process in self._finished
            await asyncio.sleep(self._random.random())

    def _draw(self) -> Random:
        return Random(self._random.random())

    def _mourn(self, director: Process, process: Process, ended: asyncio.Event) -> None:
        self._observed.ended(process.name, self._machine.monotonic)
        director.main.call_soon(ended.set)

    async def _live(self, process: Process, program: Program) -> None:
        try:
            await program(self._setting.app(process, self._connect, self._bank, self._observed))
            self._finished.add(process)
        except BrokerUnavailable as error:
            self._machine.note(process, f"gives up: {error}")
        except Exception as error:
            self._observed.unexpected.append(f"{process.name} failed: {error!r}")
        self._machine.kill(process, "exits")

    def _connect(self, process: Process) -> Broker:
        if self._kind == "memory":
            return Line(self._setting.broker(MemoryBroker(self._url())), process, self._observed)
        broker = SQLiteBroker(self._url())
        process.closers.append(lambda: system.leave_to_the_system(broker))
        return Line(self._setting.broker(broker), process, self._observed)

    def _url(self) -> str:
        return f"sqlite:///{self._folder}/postroom.db" if self._kind == "sqlite" else "memory://simulation"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that faults make the product write."""
    logger = logging.getLogger("postroom")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
