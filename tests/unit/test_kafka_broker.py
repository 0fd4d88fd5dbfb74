"""What is Kafka's own: partitions, groups, rebalances, room, and what a cluster can be misconfigured to."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import AcknowledgeType, IllegalStateException, ShareConsumer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from services.base import Server

from postroom import App
from postroom.broker.base import Ack, Consumer, Delivery, Release, Retry, Subscription, Topic
from postroom.broker.kafka import KafkaBroker
from postroom.broker.kafka.ledger import Ledger
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message, new_id
from tests.conftest import wait_until
from tests.kafka import namespace, opened
from tests.servers import private
from tests.unit.test_unique import check_beside_a_server

pytestmark = pytest.mark.server

FAILURE = Failure(attempt=1, reason="error")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


Play = Callable[[Callable[[KafkaBroker], Awaitable[None]]], None]


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.url}?{namespace()}&partitions=4&handover=5"


@pytest.fixture
def play(url: str) -> Play:
    async def run(scenario: Callable[[KafkaBroker], Awaitable[None]]) -> None:
        async with opened(url, "q") as broker:
            await scenario(broker)

    return lambda scenario: asyncio.run(run(scenario))


def messages(count: int, **fields: Any) -> list[Message]:
    return [Message(**({"id": new_id(), "topic": "q", "name": "work", "body": b"{}"} | fields)) for _ in range(count)]


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await consumer.receive(count - len(taken), 5.0)
    return taken


async def another(url: str) -> KafkaBroker:
    broker = KafkaBroker(url)
    await broker.connect()
    return broker


def test_a_rebalance_repeats_nothing_that_ends_in_time(play: Play, url: str) -> None:
    """C3: the one who has partitions goes on with what runs, and only then are they shared out anew."""

    async def scenario(broker: KafkaBroker) -> None:
        await broker.publish(messages(20))
        one = await broker.consume("q")
        held = await take(one, 10)
        other = await another(url)
        joining = await other.consume("q")
        await asyncio.sleep(1.0)
        assert await one.settle([(delivery, Ack()) for delivery in held]) == [None] * 10
        seen = {delivery.message.id for delivery in held}
        while len(seen) < 20:
            for consumer in (one, joining):
                found = await consumer.receive(10, 0.2)
                assert not seen & {delivery.message.id for delivery in found}
                seen |= {delivery.message.id for delivery in found}
                await consumer.settle([(delivery, Ack()) for delivery in found])
        assert joining.hub.name == "q"
        await other.close()

    play(scenario)


def test_what_runs_on_through_a_rebalance_is_kept_where_nothing_moved(play: Play, url: str) -> None:
    """Longer than the hand-over: what stays with its process is settled by it, the rest is lost to it, uncharged."""

    async def scenario(broker: KafkaBroker) -> None:
        await broker.publish(messages(8))
        one = await broker.consume("q", lease=60.0)
        held = await take(one, 8)
        one.started(held)
        other = await another(url)
        joining = await other.consume("q")
        found = []
        async with asyncio.timeout(20):
            while not found:
                found = await joining.receive(8, 1.0)
        assert all((delivery.attempt, delivery.suspect) == (1, False) for delivery in found)
        moved = {delivery.message.id for delivery in found}
        answers = await one.settle([(delivery, Ack()) for delivery in held])
        kept = {delivery.message.id for delivery, answer in zip(held, answers, strict=True) if answer is None}
        assert kept
        assert not kept & moved
        await other.close()

    play(scenario)


def test_what_is_done_out_of_order_stays_done(play: Play, url: str) -> None:
    """I4: one long job holds back the committed offset; what was done behind it is not repeated by the next holder."""

    async def scenario(broker: KafkaBroker) -> None:
        await broker.publish(messages(40))
        one = await broker.consume("q", lease=60.0)
        held = await take(one, 40)
        await one.settle([(delivery, Ack()) for delivery in held[1:]])
        await one.close()
        again = await broker.consume("q")
        assert [delivery.message.id for delivery in await take(again, 1)] == [held[0].message.id]
        assert await again.receive(1, 1.0) == []

    play(scenario)


def test_many_that_wait_between_done_ones_are_moved_out_of_the_way(play: Play, url: str) -> None:
    """What waits for its time is a hole among what is done, and only so many holes fit beside an offset."""

    async def scenario(broker: KafkaBroker) -> None:
        narrow = await another(url.replace("partitions=4", "partitions=1").replace("namespace=t", "namespace=n"))
        await narrow.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        consumer = await narrow.consume("q", lease=60.0)
        for _ in range(6):
            await narrow.publish(messages(200))
            taken = await take(consumer, 200)
            retries = [Retry(delay=60.0 * (number % 2), failure=FAILURE) for number in range(200)]
            await consumer.settle(list(zip(taken, retries, strict=True)))
            again = await take(consumer, 100)
            await consumer.settle([(delivery, Ack()) for delivery in again])
            await asyncio.sleep(0.5)
        (stats,) = await narrow.stats()
        assert (stats.delayed, stats.ready, stats.running) == (600, 0, 0)
        assert max(part.ledger.ranges for part in consumer.hub._parts.values()) <= 110
        await narrow.close()

    play(scenario)


def test_what_is_done_is_deleted(play: Play) -> None:
    """C15: storage does not grow with what is done; what waits, and what a retention covers, stays."""

    async def scenario(broker: KafkaBroker) -> None:
        await broker.declare(
            [Topic(name="kept", retention=3600.0), Topic(name="events")],
            [Subscription(name="slow", pattern="events"), Subscription(name="quick", pattern="events")],
        )
        await broker.publish([*messages(40), *messages(40, topic="kept"), *messages(40, topic="events")])
        for name in ("q", "quick"):
            consumer = await broker.consume(name)
            await consumer.settle([(delivery, Ack()) for delivery in await take(consumer, 40)])
        await broker.trim()
        found = {}
        for topic in ("q", "kept", "events"):
            name = broker.options.names.topic(topic)
            bounds = [await broker._reader.call(lambda reader, n=n, t=name: reader.bounds(t, n)) for n in range(4)]
            found[topic] = sum(end - start for start, end in bounds)
        assert found == {"q": 0, "kept": 40, "events": 40}
        consumer = await broker.consume("slow")
        assert len(await take(consumer, 40)) == 40

    play(scenario)


def test_a_purge_reaches_the_consumers_of_another_process(play: Play, url: str) -> None:
    async def scenario(broker: KafkaBroker) -> None:
        await broker.publish(messages(8))
        consumer = await broker.consume("q", lease=60.0)
        (running,) = await take(consumer, 1)
        other = await another(url)
        assert await other.purge("q") == 7
        deadline = time.monotonic() + 10
        while sum(len(part.items) for part in consumer.hub._parts.values()) > 1:
            assert time.monotonic() < deadline, "what was purged elsewhere is still held here"
            await asyncio.sleep(0.1)
        assert await consumer.settle([(running, Release())]) == [None]
        (again,) = await take(consumer, 1)
        assert again.message.id == running.message.id
        assert await consumer.receive(10, 0.5) == []
        await other.close()

    play(scenario)


@pytest.mark.timed
def test_a_frozen_loop_gives_its_partitions_up(play: Play, url: str) -> None:
    """C3, C7: nobody extends and nobody asks: another process gets it all, and what had started is charged."""

    async def scenario(broker: KafkaBroker) -> None:
        await broker.publish(messages(4))
        frozen = await broker.consume("q", lease=1.0)
        held = await take(frozen, 4)
        frozen.started(held)
        other = await another(url)
        consumer = await other.consume("q", lease=30.0)
        found = []
        async with asyncio.timeout(30):
            while len(found) < 4:
                more = await consumer.receive(4, 1.0)
                await consumer.settle([(delivery, Ack()) for delivery in more])
                found += more
        assert {(delivery.attempt, delivery.suspect) for delivery in found} == {(2, True)}
        answers = await frozen.settle([(delivery, Ack()) for delivery in held])
        assert None not in answers
        await other.close()

    play(scenario)


def test_a_log_that_begins_anew_is_read_from_its_beginning(play: Play) -> None:
    """C2: offsets below those already seen are other messages: the topic was made anew, or cut after an outage."""

    async def scenario(broker: KafkaBroker) -> None:
        consumer = await broker.consume("q")
        await consumer.hub.joined()
        for part in consumer.hub._parts.values():
            part.ledger = Ledger(1000)
        sent = messages(4)
        await broker.publish(sent)
        taken = await take(consumer, 4)
        assert {delivery.message.id for delivery in taken} == {message.id for message in sent}
        assert await consumer.settle([(delivery, Ack()) for delivery in taken]) == [None] * 4
        (stats,) = await broker.stats()
        assert (stats.ready, stats.running) == (0, 0)

    play(scenario)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    async def run() -> None:
        broker = KafkaBroker("kafka://127.0.0.1:1?timeout=1")
        with pytest.raises(BrokerUnavailable):
            await broker.connect()
        await broker.close()

    asyncio.run(run())


def test_the_doctor_finds_what_was_planted(play: Play) -> None:
    """Seven misconfigurations of a real server, each by its name."""

    async def scenario(broker: KafkaBroker) -> None:
        names = broker.options.names
        before = {finding.title for finding in await broker.examine() if finding.level != "ok"}
        assert before == {"copies of each message", "memory of idle subscriptions"}
        planted = {
            names.topic("q"): {"cleanup.policy": "compact", "retention.ms": "1000", "max.message.bytes": "1000"},
            names.later("q"): {"unclean.leader.election.enable": "true"},
            names.dead("q"): {"cleanup.policy": "delete"},
        }
        resources = [
            ConfigResource(
                ResourceType.TOPIC,
                name,
                incremental_configs=[
                    ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
                    for setting, value in settings.items()
                ],
            )
            for name, settings in planted.items()
        ]
        admin = AdminClient(broker.options.client)
        for future in admin.incremental_alter_configs(resources).values():
            await asyncio.wrap_future(future)
        found: set[str] = set()
        deadline = time.monotonic() + 10
        while len(found) < 7 and time.monotonic() < deadline:
            found = {finding.title for finding in await broker.examine() if finding.level != "ok"}
        assert found == before | {
            "compaction of messages",
            "messages that end by themselves",
            "size of messages",
            "leaders that lack messages",
            "dead letters and topology",
        }

    play(scenario)


def test_a_loop_that_ends_without_closing_leaves_the_group(
    play: Play, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C4: its threads go with it, whatever they were about to tell it, and others get its messages at once."""
    before = set(threading.enumerate())

    async def abandon() -> None:
        broker = await another(url)
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish(messages(200))
        consumer = await broker.consume("q")
        held = await take(consumer, 100)
        # Under way when the loop ends: a commit, and messages that come.
        asyncio.get_running_loop().create_task(consumer.settle([(delivery, Ack()) for delivery in held]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def scenario(broker: KafkaBroker) -> None:
        await take(await broker.consume("q"), 100)

    with caplog.at_level(logging.WARNING):
        asyncio.run(abandon())
        members = [
            thread
            for thread in set(threading.enumerate()) - before
            if thread.name.startswith("postroom-kafka-")
            and "reader" not in thread.name
            and "producer" not in thread.name
        ]
        assert len(members) == 2
        wait_until(lambda: not any(thread.is_alive() for thread in members), "the end of the threads")
        begin = time.monotonic()
        play(scenario)
    assert time.monotonic() - begin < 5.0, "the group waited for its session"
    assert caplog.records == []


def test_why_share_groups_are_refused(server: Server, url: str) -> None:
    """The reasons of docs/brokers/kafka.md. If this fails, the client has learnt something: think again."""
    assert {name for name in dir(AcknowledgeType) if name.isupper()} == {"ACCEPT", "RELEASE", "REJECT"}
    client = {"bootstrap.servers": server.url.removeprefix("kafka://"), "log_level": 0}
    group = url.partition("namespace=")[2].partition("&")[0]
    earliest = ConfigEntry("share.auto.offset.reset", "earliest", incremental_operation=AlterConfigOpType.SET)
    admin = AdminClient(client)
    (change,) = admin.incremental_alter_configs(
        [ConfigResource(ResourceType.GROUP, group, incremental_configs=[earliest])]
    ).values()
    change.result()

    async def publish() -> None:
        broker = await another(url)
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish(messages(2, key="k"))
        await broker.close()

    asyncio.run(publish())
    consumer = ShareConsumer(client | {"group.id": group, "share.acknowledgement.mode": "explicit"})
    consumer.subscribe([f"{group}.q"])
    try:
        one, other = wait_until(lambda: list(consumer.poll(0.5)), "two messages", timeout=30)
        consumer.acknowledge(one)
        consumer.commit_sync()
        with pytest.raises(IllegalStateException, match="1 records from previous poll"):
            consumer.poll(0.5)
        consumer.acknowledge(other)
    finally:
        consumer.close()


def test_unique_jobs_through_a_store(url: str, tmp_path: Path) -> None:
    with App(url, store=f"sqlite:///{tmp_path}/jobs.db") as app:
        check_beside_a_server(app)
