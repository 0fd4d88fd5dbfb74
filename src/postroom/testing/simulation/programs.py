"""What the simulated processes run: a worker, a producer, a client."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from msgspec import json

from postroom.errors import BrokerUnavailable, JobNotFound, PostroomError
from postroom.producer.job import Job
from postroom.store.outbox.relay import Relay
from postroom.testing.simulation.app import SimulatedApp
from postroom.testing.simulation.child import SimulatedChildren
from postroom.testing.simulation.observed import Order, Redrive
from postroom.worker.isolation import ChildPool
from postroom.worker.process import Worker, WorkerOptions
from postroom.worker.threads import ThreadPool

GRACE = 1.0
BROKEN = "broken"
"""The queue of what fails until somebody mends it."""
_CONCURRENCY = 4
_WATCHED = 2
"""Jobs that the client looks at, again and again."""
_PAUSE = 0.4
_RELAY_PAUSE = 0.4


class SimulatedWorker(Worker):
    """Sync handlers run as one step each, children are simulated."""

    _app: SimulatedApp

    def _make_threads(self) -> ThreadPool:
        return _Steps(_CONCURRENCY)

    def _children(self, names: Sequence[str]) -> ChildPool | None:
        return SimulatedChildren(self._app) if self._app.has_children else None


class _Steps(ThreadPool):
    def submit(self, job: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(job)

    def close(self) -> None:
        """There are none."""


async def work(app: SimulatedApp, queues: Sequence[str]) -> None:
    """A worker process, until SIGTERM."""
    await SimulatedWorker(app, WorkerOptions(concurrency=_CONCURRENCY, grace=GRACE, queues=queues)).run()
    await app.thread.acall(lambda broker: broker.close())


async def produce(app: SimulatedApp, orders: Sequence[Order], random: Random) -> None:
    """A producer process: publishes its orders one after the other; started anew it goes on where it was."""
    for order in orders:
        while order.is_open():
            await asyncio.sleep(random.random() * _PAUSE)
            order.attempted = True
            order.tried_at = app.process.machine.monotonic
            order.ready_at = order.tried_at + order.delay
            try:
                await _publish(app, order)
            except (PostroomError, sqlite3.Error) as error:
                app.process.machine.note(app.process, f"{order.label} is not confirmed: {error}")
    await app.thread.acall(lambda broker: broker.close())


async def _publish(app: SimulatedApp, order: Order) -> None:
    if not order.joined:
        _note(app, order, await _enqueue(app, order))
        return
    async with app.bank.transaction() as connection:
        connection.execute("INSERT INTO intent VALUES (?)", (order.label,))
        job = await _enqueue(app, order, transaction=connection)
        order.ids.add(job.id)
        if order.rolled_back:
            order.given_up = True
            return
        connection.execute("COMMIT")
    _note(app, order, job)


async def _enqueue(app: SimulatedApp, order: Order, transaction: object = None) -> Job[Any]:
    options = {
        "key": order.key,
        "idempotency_key": order.idempotency_key,
        "delay": order.delay or None,
        "expires_in": order.expires_in,
        "transaction": transaction,
    }
    if order.task == "paid":
        headers = {"region": order.arguments["region"]}
        return await app.topics["paid"].using(headers=headers, **options).apublish(order.arguments)  # type: ignore[arg-type]
    task = app.tasks[order.task].using(unique=order.unique, replace=order.replace, **options)  # type: ignore[arg-type]
    return await task.aenqueue(**order.arguments)


def _note(app: SimulatedApp, order: Order, job: Job[Any]) -> None:
    machine = app.process.machine
    order.ids.add(job.id)
    if order.published_at is None:
        order.published_at = machine.monotonic
    machine.note(app.process, f"published {order.label} as {job.id[-6:]}")


async def look(app: SimulatedApp, orders: Sequence[Order], random: Random) -> None:
    """A client: looks at jobs, and cancels some."""
    machine, observed = app.process.machine, app.observed
    watched = [order for order in orders if not order.joined]
    watched = random.sample(watched, min(_WATCHED, len(watched)))
    unwanted = [order for order in orders if order.unwanted]
    while True:
        await asyncio.sleep(random.random() * 2 * _PAUSE)
        for order in watched:
            if order.published_at is None:
                continue
            job = app.job(min(order.ids))
            try:
                status = await job.astatus()
            except JobNotFound as error:
                observed.unexpected.append(f"{order.label} was confirmed, and is unknown: {error}")
            except PostroomError:
                continue
            else:
                observed.shown[job.id].append((machine.monotonic, status.state, status.attempt))
        for order in unwanted:
            if order.published_at is not None and not order.cancelled:
                try:
                    answer = await app.job(min(order.ids)).acancel()
                except PostroomError:
                    continue
                order.cancelled, order.cancelled_at = answer, machine.monotonic
                machine.note(app.process, f"cancel of {order.label}: {answer}")


async def mend(app: SimulatedApp, random: Random) -> None:
    """A person: looks for dead letters of broken handlers, mends some of these, and redrives."""
    machine, observed = app.process.machine, app.observed
    letters = app.dead_letters(BROKEN)
    while not machine.faults.calm:
        await asyncio.sleep(random.random() * 2 * _PAUSE)
        try:
            dead = [letter.message for letter in await letters.alist()]
            chosen = [message for message in dead if random.random() < 0.5]
            labels = {message.id: str(json.decode(message.body)["label"]) for message in chosen}
            observed.mended.update(label for label in labels.values() if random.random() < 0.5)
            asked = [Redrive(at=machine.monotonic, mended=label in observed.mended) for label in labels.values()]
            for id, redrive in zip(labels, asked, strict=True):
                observed.redriven[id, BROKEN].append(redrive)
            if chosen and await letters.aredrive(list(labels)) == len(chosen):
                machine.note(app.process, f"redrove {', '.join(labels.values())}")
                for redrive in asked:
                    redrive.confirmed = True
        except PostroomError as error:
            machine.note(app.process, f"no redrive: {error}")
    await app.thread.acall(lambda broker: broker.close())


async def relay(app: SimulatedApp, relay_class: type[Relay], url: str) -> None:
    """A relay of the outbox at ``url``, as ``Relay.run`` does it: a turn is one step, but for statements and sends."""
    machine = app.process.machine
    stopping = asyncio.Event()
    app.process.main.add_signal_handler(signal.SIGTERM, stopping.set)
    made = relay_class(url, lambda messages: machine.wait(app.outlet.submit(messages)))
    while not stopping.is_set():
        try:
            sent = made.run_once()
        except BrokerUnavailable as error:
            machine.note(app.process, f"cannot send: {error}")
        else:
            if sent:
                machine.note(app.process, f"sent {sent}")
        await asyncio.sleep(_RELAY_PAUSE)
    made.close()
    await app.thread.acall(lambda broker: broker.close())
