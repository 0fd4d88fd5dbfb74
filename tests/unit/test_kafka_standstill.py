"""What waits between what is done: only so much can be said of a partition, and nothing may come to a standstill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError, Producer
from services.base import Server

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.broker.kafka.hub import READ_AHEAD
from postroom.broker.kafka.ledger import FULL
from postroom.broker.kafka.wire import MAX_COPY, MAX_HISTORY, MAX_RECORD, Record
from postroom.message import Failure, Message, new_id
from tests.kafka import namespace, opened, url_of
from tests.servers import private

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


@pytest.fixture
def url(server: Server) -> str:
    return f"{url_of(server)}&handover=5"


def message(**fields: Any) -> Message:
    return Message(**({"id": new_id(), "topic": "q", "name": "work", "body": b"{}"} | fields))


async def handle(consumer: Consumer, count: int) -> list[str]:
    """So many, each done as soon as it came; and then no more."""
    done: list[str] = []
    async with asyncio.timeout(30):
        while len(done) < count:
            taken = await consumer.receive(50, 5.0)
            assert taken, f"nothing more after {len(done)}"
            assert await consumer.settle([(delivery, Ack()) for delivery in taken]) == [None] * len(taken)
            done += [delivery.message.id for delivery in taken]
    assert await consumer.receive(50, 0.3) == []
    return done


def test_no_more_is_read_than_a_worker_will_soon_need(url: str) -> None:
    """C15: what is read ahead is work for nothing as soon as its partition moves to another process."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await broker.publish([message() for _ in range(4000)])
            consumer = await broker.consume("q")
            taken = await consumer.receive(50, 10.0)
            held = 0
            for _ in range(10):
                await asyncio.sleep(0.1)
                held = max(held, *(len(part.items) for part in consumer.hub._parts.values()))
            assert READ_AHEAD <= held < 2 * READ_AHEAD
            await consumer.settle([(delivery, Ack()) for delivery in taken])
            assert len(set(await handle(consumer, 3950))) == 3950

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [False, True], ids=["who joins stays", "who joins leaves"])
def test_a_long_backlog_is_read_on_after_a_rebalance(server: Server, leaves: bool) -> None:
    """C2: all partitions are full here, and not read on; one of them stays, the other moves and perhaps comes back."""
    url = f"{server.url}?{namespace()}&partitions=2"

    async def scenario() -> None:
        async with opened(url, "q") as broker, opened(url) as another:
            await broker.publish([message() for _ in range(6 * READ_AHEAD)])
            consumer = await broker.consume("q")
            taken = await consumer.receive(50, 10.0)
            parts = consumer.hub._parts.values()
            async with asyncio.timeout(20):
                while sum(part.paused for part in parts) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await consumer.settle([(delivery, Ack()) for delivery in taken])
            other = await another.consume("q")
            await other.hub.joined()
            if leaves:
                await other.close()
            left, consumers = 6 * READ_AHEAD - len(taken), [consumer] if leaves else [consumer, other]
            async with asyncio.timeout(30):
                while left > 0:
                    for each in consumers:
                        taken = await each.receive(200, 0.1)
                        assert await each.settle([(delivery, Ack()) for delivery in taken]) == [None] * len(taken)
                        left -= len(taken)

    asyncio.run(scenario())


def test_a_filter_that_wants_every_second_of_many(url: str) -> None:
    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await broker.declare([Topic(name="t")], [Subscription(name="eu", pattern="t", where={"region": "eu"})])
            sent = [message(topic="t", headers={"region": ("eu", "us")[number % 2]}) for number in range(1200)]
            await broker.publish(sent)
            done = await handle(await broker.consume("eu"), 600)
            assert done == [each.id for each in sent[::2]]

    asyncio.run(scenario())


def test_delayed_ones_among_many_that_are_ready(url: str) -> None:
    """C6: they hold up nobody, though each is a hole in what is done; and they are kept."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            later = time.time() + 600.0
            sent = [message(not_before=later if number % 2 else None) for number in range(1200)]
            await broker.publish(sent)
            done = await handle(await broker.consume("q"), 600)
            assert set(done) == {each.id for each in sent[::2]}
            (stats,) = await broker.stats()
            assert (stats.ready, stats.delayed, stats.running) == (0, 600, 0)

    asyncio.run(scenario())


def test_more_suspects_than_can_be_told_of_at_once(url: str) -> None:
    """C7: a process that dies with many leaves as many suspects in one partition; one after the other goes on."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await broker.publish([message() for _ in range(400)])
            frozen = await broker.consume("q", lease=1.0)
            held: list[Delivery] = []
            while more := await frozen.receive(500, 0.3):
                frozen.started(more)
                held += more
            assert len(held) == FULL
            assert len(set(await handle(await broker.consume("q"), 400))) == 400

    asyncio.run(scenario())


def test_what_a_former_holder_has_done_is_not_repeated_while_it_still_arrives(url: str) -> None:
    """I4: large messages come a few at a time; the first one may be done before those behind it are here."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            for _ in range(3):
                await broker.publish([message(body=b'"%s"' % (b"x" * 200_000)) for _ in range(20)])
            consumer = await broker.consume("q")
            taken: list[Delivery] = []
            while len(taken) < 60:
                taken += await consumer.receive(60, 5.0)
            await consumer.settle([(delivery, Ack()) for delivery in taken[1:]])
            await consumer.close()
            assert await handle(await broker.consume("q"), 1) == [taken[0].message.id]

    asyncio.run(scenario())


def test_a_rebalance_waits_for_what_is_being_moved(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: a copy whose original is not known as done would be a second message."""

    async def scenario() -> None:
        async with opened(url, "q") as broker, opened(url, "q") as other:
            one = await broker.consume("q", lease=60.0)
            await one.hub.joined()
            moving, confirmed = asyncio.Event(), asyncio.Event()
            send = broker._sender.send

            async def slowly(records: Sequence[Record]) -> list[KafkaError | None]:
                errors = await send(records)
                if records and records[0].topic == broker.options.names.later("q"):
                    moving.set()
                    await confirmed.wait()
                return errors

            monkeypatch.setattr(broker._sender, "send", slowly)
            await broker.publish([message(not_before=time.time() + 600.0)])
            await moving.wait()
            two = await other.consume("q", lease=60.0)
            await asyncio.sleep(1.0)
            confirmed.set()
            await two.hub.joined()
            await one.close()
            (stats,) = await other.stats()
            while stats.delayed > 1:
                await asyncio.sleep(0.2)
                (stats,) = await other.stats()
            assert (stats.ready, stats.delayed) == (0, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("ordered", [False, True], ids=["from now on", "no longer"])
def test_a_subscription_whose_order_changes_goes_on(url: str, ordered: bool) -> None:
    """C2: what one process holds of it when another declares it anew."""

    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t", ordered=ordered)])
            sent = [message(topic="t", key="k") for _ in range(6)]
            await broker.publish(sent)
            consumer = await broker.consume("s")
            (first,) = await consumer.receive(1, 10.0)
            assert await consumer.settle([(first, Ack())]) == [None]
            await broker.declare([], [Subscription(name="s", pattern="t", ordered=not ordered)])
            assert await handle(consumer, 5) == [each.id for each in sent[1:]]

    asyncio.run(scenario())


@pytest.mark.parametrize("ordered", [False, True], ids=["queue", "ordered"])
def test_a_large_message_of_another_client_can_fail(server: Server, url: str, ordered: bool) -> None:
    """C8: with all its failures, whatever a topic takes; else whoever holds it would try to settle it for ever."""

    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t", ordered=ordered)])
            foreign = Producer({"bootstrap.servers": server.url.partition("//")[2], "message.max.bytes": MAX_COPY})
            foreign.produce(broker.options.names.topic("t"), b"x" * (MAX_RECORD - 200), b"key")
            assert foreign.flush(10) == 0
            consumer = await broker.consume("s")
            failure = Failure(attempt=1, reason="error", traceback="x" * 2 * MAX_HISTORY)
            long = msgspec.structs.replace(failure, traceback="x" * (MAX_HISTORY - 1000))
            for outcome in (Retry(delay=0.0, failure=failure), Retry(delay=0.0, failure=long), Dead(failure)):
                (delivery,) = await consumer.receive(1, 10.0)
                assert await consumer.settle([(delivery, outcome)]) == [None]
            (letter,) = await broker.dead_letters("s")
            assert len(letter.failures) == 3

    asyncio.run(scenario())
