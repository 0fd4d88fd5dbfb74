"""A process that dies between any two steps of broker and store leaves behind what can be lived with."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Release, Retry, Subscription, Topic
from postroom.errors import IdempotencyConflict
from postroom.message import Failure, JobState, Message, new_id
from postroom.store.beside import StoredBroker
from postroom.store.sqlite import SQLiteStore
from postroom.testing.clock import ManualClock
from tests.conformance.test_stored import Poor

QUEUE = "work"
LEASE = 30.0
FAILURE = Failure(attempt=1, reason="error", error="ValueError", message="it broke")


class Died(BaseException):
    """The process is gone; nobody catches it."""


class Fuse:
    """Counts the steps of a process, and ends it before or after the step chosen."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.count = 0

    def burn(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Died

    def through(self, target: Any) -> Any:
        """``target``, where each call of a coroutine function is a step that begins and ends."""
        return _Fused(target, self)


class _Fused:
    def __init__(self, target: Any, fuse: Fuse) -> None:
        self._target, self._fuse = target, fuse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not inspect.iscoroutinefunction(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._fuse.burn()
            result = await value(*args, **kwargs)
            self._fuse.burn()
            return self._fuse.through(result) if isinstance(result, Consumer) else result

        return call


class World:
    """One broker and one store that outlive the processes using them."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"
        self._store = f"sqlite:///{folder}/{uuid4().hex}.db"

    def process(self, fuse: Fuse | None = None) -> StoredBroker:
        broker: Any = Poor(self._url, clock=self.clock)
        store: Any = SQLiteStore(self._store, clock=self.clock)
        if fuse is not None:
            broker, store = fuse.through(broker), fuse.through(store)
        return StoredBroker(broker, store, clock=self.clock)


def message(body: bytes = b"{}", **options: Any) -> Message:
    return Message(id=new_id(), topic=QUEUE, name="work", body=body, created_at=1.0, **options)


async def started(world: World) -> StoredBroker:
    broker = world.process()
    await broker.connect()
    await broker.declare([Topic(name=QUEUE, queue=True)], [Subscription(name=QUEUE, pattern=QUEUE)])
    return broker


async def survive(world: World, at: int, act: Callable[[StoredBroker], Awaitable[Any]]) -> bool:
    """Let a process act and die at step ``at``. Whether it got through alive."""
    fuse = Fuse()
    process = world.process(fuse)
    await process.connect()
    fuse.count, fuse.at = 0, at
    try:
        await act(process)
    except Died:
        # Its connections break; the broker notices by the lease, as for a frozen one.
        fuse.at = None
        await world.clock.advance(2 * LEASE)
        return False
    fuse.at = None
    await process.close()
    return True


async def handle(broker: StoredBroker, outcome: Callable[[Delivery], Any]) -> list[Delivery]:
    """Everything that comes, settled."""
    consumer = await broker.consume(QUEUE, lease=LEASE)
    ran: list[Delivery] = []
    while deliveries := await consumer.receive(10, 0.0):
        ran += deliveries
        assert await consumer.settle([(delivery, outcome(delivery)) for delivery in deliveries]) == [None] * len(
            deliveries
        )
    await consumer.close()
    return ran


def every_step(act: Callable[[Path, int], Awaitable[bool]], tmp_path: Path) -> int:
    """Run ``act`` with a death at each step, until one run gets through alive. Returns how many died."""
    for at in range(1, 100):
        if asyncio.run(act(tmp_path, at)):
            return at - 1
    raise AssertionError("it never gets through")


def test_publish(tmp_path: Path) -> None:
    """Whoever tries again with the same key gets one message, one run, one record."""

    async def act(folder: Path, at: int) -> bool:
        world = World(folder)
        witness = await started(world)
        first = message(idempotency_key="k")
        alive = await survive(world, at, lambda broker: broker.publish([first]))
        (answer,) = await witness.publish([message(idempotency_key="k")])
        assert answer == first.id or not alive
        (conflict,) = await witness.publish([message(b"[]", idempotency_key="k")])
        assert isinstance(conflict, IdempotencyConflict)
        ran = await handle(witness, lambda _: Ack(b"1"))
        assert [delivery.message.id for delivery in ran] == [answer]
        (record,) = await witness.jobs.get(str(answer))
        assert (record.state, record.result) == (JobState.SUCCEEDED, b"1")
        await witness.close()
        return alive

    assert every_step(act, tmp_path) == 6


@pytest.mark.parametrize("outcome", [Ack(b"1"), Dead(FAILURE), Retry(delay=0.0, failure=FAILURE), Release()])
def test_settle(tmp_path: Path, outcome: Any) -> None:
    """What has ended does not run again; what has not ended does; the record tells the truth in the end."""

    async def act(folder: Path, at: int) -> bool:
        world = World(folder)
        witness = await started(world)
        sent = message()
        await witness.publish([sent])
        runs: list[Delivery] = []

        async def work(broker: StoredBroker) -> None:
            consumer = await broker.consume(QUEUE, lease=LEASE)
            deliveries = await consumer.receive(1, 0.0)
            runs.extend(deliveries)
            await consumer.settle([(delivery, outcome) for delivery in deliveries])

        alive = await survive(world, at, work)
        (between,) = await witness.jobs.get(sent.id)
        ran = await handle(witness, lambda _: Ack(b"2"))
        await world.clock.advance(2 * LEASE)
        assert len(ran) <= 1
        (record,) = await witness.jobs.get(sent.id)
        letters = await witness.dead_letters(QUEUE)
        # What it says never goes back, and a failure that the broker knows of is told, once.
        assert record.attempt >= between.attempt
        assert record.failures[: len(between.failures)] == between.failures
        assert len(record.failures) == (isinstance(outcome, Retry | Dead) and (not ran or record.attempt > 1))
        if ran:
            assert (record.state, record.result, letters) == (JobState.SUCCEEDED, b"2", [])
        elif isinstance(outcome, Dead):
            assert record.state is JobState.DEAD
            assert [letter.message.id for letter in letters] == [sent.id]
        else:
            assert runs
            assert isinstance(outcome, Ack)
            assert (record.state, record.result) == (JobState.SUCCEEDED, b"1")
        assert not (alive and isinstance(outcome, Ack | Dead) and ran)
        await witness.close()
        return alive

    assert every_step(act, tmp_path) >= 8


def test_a_retry_that_runs_at_once(tmp_path: Path) -> None:
    """Another worker may have it before the broker has answered; by then its failure is told."""

    async def act() -> None:
        world = World(tmp_path)
        first, second = await started(world), await started(world)
        sent = message()
        await first.publish([sent])
        consumer, other = await first.consume(QUEUE, lease=LEASE), await second.consume(QUEUE, lease=LEASE)
        (delivery,) = await consumer.receive(1, 0.0)
        inner = consumer._consumer  # type: ignore[attr-defined]
        settle, ran = inner.settle, []

        async def settle_slowly(settlements: Any) -> Any:
            answers = await settle(settlements)
            ran.extend(await other.receive(1, 5.0))
            return answers

        inner.settle = settle_slowly
        assert await consumer.settle([(delivery, Retry(delay=0.0, failure=FAILURE))]) == [None]
        (record,) = await first.jobs.get(sent.id)
        assert (record.state, record.attempt, record.failures) == (JobState.RUNNING, 2, (FAILURE,))
        assert await other.settle([(ran[0], Ack())]) == [None]
        (record,) = await first.jobs.get(sent.id)
        assert (record.state, record.attempt, record.failures) == (JobState.SUCCEEDED, 2, (FAILURE,))
        for broker in (first, second):
            await broker.close()

    asyncio.run(act())


def test_redrive(tmp_path: Path) -> None:
    """The letter is dead or redriven; tried again, it runs once more, and its record says so."""

    async def act(folder: Path, at: int) -> bool:
        world = World(folder)
        witness = await started(world)
        sent = message()
        await witness.publish([sent])
        await handle(witness, lambda _: Dead(FAILURE))
        alive = await survive(world, at, lambda broker: broker.redrive(QUEUE, [sent.id]))
        ran = await handle(witness, lambda _: Ack(b"1"))
        if not ran:
            assert [letter.message.id for letter in await witness.dead_letters(QUEUE)] == [sent.id]
            assert await witness.redrive(QUEUE, [sent.id]) == [sent.id]
            ran = await handle(witness, lambda _: Ack(b"1"))
        assert [delivery.message.headers for delivery in ran] == [{}]
        (record,) = await witness.jobs.get(sent.id)
        assert record.state is JobState.SUCCEEDED
        await witness.close()
        return alive

    assert every_step(act, tmp_path) == 6


def test_replace(tmp_path: Path) -> None:
    """At least one of the two is run, and only the later one if nobody died."""

    async def act(folder: Path, at: int) -> bool:
        world = World(folder)
        witness = await started(world)
        options = {"idempotency_key": "k", "unique": "until_started", "replace": True}
        first, second = message(b"[1]", **options), message(b"[2]", **options)
        await witness.publish([first])
        alive = await survive(world, at, lambda broker: broker.publish([second]))
        ran = [delivery.message.id for delivery in await handle(witness, lambda _: Ack())]
        assert set(ran) <= {first.id, second.id}
        assert len(ran) == len(set(ran)) > 0
        assert not alive or ran == [second.id]
        (again,) = await witness.publish([message(b"[3]", **options)])
        assert [delivery.message.id for delivery in await handle(witness, lambda _: Ack())] == [again]
        await witness.close()
        return alive

    assert every_step(act, tmp_path) == 8


def test_a_receive_that_is_cancelled_gives_back(tmp_path: Path) -> None:
    async def act() -> None:
        world = World(tmp_path)
        broker = await started(world)
        consumer = await broker.consume(QUEUE, lease=LEASE)
        for turns in range(30):
            waiting = asyncio.create_task(consumer.receive(1, None))
            sent = message()
            await broker.publish([sent])
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            (result,) = await asyncio.gather(waiting, return_exceptions=True)
            got = result if isinstance(result, list) else await consumer.receive(1, 1.0)
            assert [(delivery.message.id, delivery.attempt) for delivery in got] == [(sent.id, 1)]
            assert await consumer.settle([(got[0], Ack())]) == [None]
        await broker.close()

    asyncio.run(act())


def test_what_has_ended_is_removed(tmp_path: Path) -> None:
    """A store that has seen many jobs stays small."""

    async def act() -> int:
        world = World(tmp_path)
        broker = await started(world)
        for _ in range(20):
            await broker.publish([message(result_ttl=0.0, idempotency_key=new_id(), dedup_window=10.0)])
        await broker.publish([message(result_ttl=0.0, idempotency_key="unique", unique="until_done")])
        await broker.publish([message(result_ttl=0.0, expires_at=world.clock.now() + 1.0)])
        await handle(broker, lambda _: Ack())
        await world.clock.advance(2 * 86_400.0)
        store: SQLiteStore = broker._store  # type: ignore[assignment]
        await store.engine.write(store.sweep)
        tables = ("record", "dedup")
        left = sum(store.engine.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)
        await broker.close()
        return left

    assert asyncio.run(act()) == 0
