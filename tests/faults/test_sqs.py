"""SQS under fault: workers that are killed, frozen or kill themselves; a service or its answers that go away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest
from services.sqs import CREDENTIALS, SQSServer

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.broker.sqs import SQSBroker
from postroom.errors import BrokerUnavailable, LeaseLost
from postroom.message import Failure, Message, new_id
from tests.faults.processes import Stage, stage
from tests.faults.proxy import Proxy, proxy_to
from tests.faults.scenarios import (
    few_starts_and_twins,
    freeze_a_worker,
    freeze_the_server,
    kill_now_and_then,
    killers_among_innocents,
    restart_the_server_under_load,
)
from tests.servers import private

FAILURE = Failure(attempt=1, reason="error", error="ValueError")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SQSServer]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with private("sqs", tmp_path / "server") as made:
        assert isinstance(made, SQSServer)
        yield made


@pytest.fixture
def faults(server: SQSServer, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, lease=3.0, url=server.url) as made:
        yield made


# Workers


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3, I6, C4."""
    kill_now_and_then(faults, tasks, jobs=2000, pause=0.05, workers=3, concurrency=20, kills=4, every=250)


@pytest.mark.timeout(240)
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b, C7. A process that died is charged with all it had taken: a killer that waited in it has one start less."""
    few_starts_and_twins(killers_among_innocents(faults, tasks))


def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: frozen past its lease."""
    freeze_a_worker(faults, tasks, pause=2.0)


# The service


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_service_goes_away_under_load(server: SQSServer, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17."""
    restart_the_server_under_load(server, faults, tasks)


@pytest.mark.timed
def test_a_worker_outlives_a_frozen_service(server: SQSServer, faults: Stage, tasks: ModuleType) -> None:
    """C17."""
    freeze_the_server(server, faults, tasks, busy=1.0, timeout=30)


# Answers that are lost


class Desk:
    """A broker behind a proxy, with a queue."""

    def __init__(self, broker: SQSBroker, direct: SQSBroker, proxy: Proxy) -> None:
        self.broker = broker
        self.direct = direct
        self.proxy = proxy

    def message(self) -> Message:
        return Message(id=new_id(), topic="desk", name="work", body=b'{"n": 1}', created_at=time.time())

    async def take(self, consumer: Consumer, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        async with asyncio.timeout(20):
            while len(taken) < count:
                taken += await consumer.receive(count - len(taken), 5.0)
        return taken

    async def held(self) -> dict[str, int]:
        (stats,) = await self.direct.stats()
        return {name: count for name in ("ready", "delayed", "running", "dead") if (count := getattr(stats, name))}


@pytest.fixture
def play(server: SQSServer) -> Iterator[Callable[[Callable[[Desk], Awaitable[None]]], None]]:
    namespace = f"t{uuid4().hex[:12]}"
    with proxy_to(server.port) as proxy:

        async def run(scenario: Callable[[Desk], Awaitable[None]]) -> None:
            through = f"sqs://eu-west-1?endpoint_url=http://127.0.0.1:{proxy.port}&namespace={namespace}"
            broker, direct = SQSBroker(through), SQSBroker(f"{server.url}&namespace={namespace}")
            await broker.connect()
            await direct.connect()
            try:
                await broker.declare([Topic(name="desk", queue=True)], [Subscription(name="desk", pattern="desk")])
                await scenario(Desk(broker, direct, proxy))
            finally:
                proxy.silent, proxy.lose_replies, proxy.cut_on = False, 0, None
                await broker.close()
                await direct.close()

        yield lambda scenario: asyncio.run(run(scenario))


def test_the_answer_to_a_publish_is_lost(play: Callable[[Callable[[Desk], Awaitable[None]]], None]) -> None:
    """C1: it is told as unknown, and sent by nobody but the caller: two calls, two copies, one id."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        await desk.broker.publish([desk.message()])
        consumer = await desk.direct.consume("desk")
        await consumer.settle([(delivery, Ack()) for delivery in await desk.take(consumer, 1)])
        desk.proxy.lose_replies = 1
        with pytest.raises(BrokerUnavailable):
            await desk.broker.publish([message])
        assert await desk.broker.publish([message]) == [message.id]
        taken = await desk.take(consumer, 2)
        assert [delivery.message for delivery in taken] == [message, message]
        await consumer.settle([(delivery, Ack()) for delivery in taken])
        assert await desk.held() == {}

    play(scenario)


def test_the_answer_to_an_ack_is_lost(play: Callable[[Callable[[Desk], Awaitable[None]]], None]) -> None:
    """C2: settling again succeeds, though the message is gone already."""

    async def scenario(desk: Desk) -> None:
        await desk.broker.publish([desk.message()])
        consumer = await desk.broker.consume("desk")
        (delivery,) = await desk.take(consumer, 1)
        desk.proxy.lose_replies = 1
        with pytest.raises(BrokerUnavailable):
            await consumer.settle([(delivery, Ack())])
        assert await consumer.settle([(delivery, Ack())]) == [None]
        assert await desk.held() == {}

    play(scenario)


def test_the_answer_to_a_retry_is_lost(play: Callable[[Callable[[Desk], Awaitable[None]]], None]) -> None:
    """C2, C6: the copy may be there twice, but it is there, and the original is not."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        await desk.broker.publish([message])
        consumer = await desk.broker.consume("desk")
        (delivery,) = await desk.take(consumer, 1)
        retry = Retry(delay=0.0, failure=FAILURE)
        desk.proxy.lose_replies = 1
        with pytest.raises(BrokerUnavailable):
            await consumer.settle([(delivery, retry)])
        assert await consumer.settle([(delivery, retry)]) == [None]
        taken = await desk.take(consumer, 2)
        assert [(delivery.message, delivery.attempt) for delivery in taken] == [(message, 2)] * 2

    play(scenario)


@pytest.mark.parametrize("outcome", [Retry(delay=0.0, failure=FAILURE), Dead(FAILURE)], ids=["retry", "dead"])
def test_a_crash_between_copy_and_deletion(
    play: Callable[[Callable[[Desk], Awaitable[None]]], None], outcome: Retry | Dead
) -> None:
    """C2: the copy is confirmed, the original is still there: it comes again when its lease is over."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        await desk.broker.publish([message])
        consumer = await desk.broker.consume("desk", lease=3.0)
        (delivery,) = await desk.take(consumer, 1)
        desk.proxy.cut_on = b"AmazonSQS.DeleteMessageBatch"
        with pytest.raises(BrokerUnavailable):
            await consumer.settle([(delivery, outcome)])
        copies = {"dead": 1} if isinstance(outcome, Dead) else {"ready": 1}
        assert await desk.held() == {"running": 1, **copies}
        # Nothing is heard any more of the one that crashed here.
        other = await desk.direct.consume("desk")
        expected = 1 if isinstance(outcome, Dead) else 2
        taken = await desk.take(other, expected)
        assert {delivery.message.id for delivery in taken} == {message.id}
        assert [answer for answer in await consumer.settle([(delivery, outcome)]) if isinstance(answer, LeaseLost)]

    play(scenario)


def test_a_redrive_that_dies_half_way(play: Callable[[Callable[[Desk], Awaitable[None]]], None]) -> None:
    """C8, I14: each letter is in one of the two places, or for a while in both; a second redrive finishes the first."""

    async def scenario(desk: Desk) -> None:
        messages = [desk.message() for _ in range(3)]
        await desk.broker.publish(messages)
        consumer = await desk.broker.consume("desk")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await desk.take(consumer, 3)])
        desk.proxy.cut_on = b"AmazonSQS.DeleteMessageBatch"
        ids = [message.id for message in messages]
        assert await desk.broker.redrive("desk", ids) == ids
        desk.proxy.cut_on = None
        assert await desk.held() == {"ready": 3, "dead": 3}
        taken = await desk.take(consumer, 3)
        assert sorted(delivery.message.id for delivery in taken) == sorted(ids)

    play(scenario)
