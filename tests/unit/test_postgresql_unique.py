"""Unique jobs on PostgreSQL: what the suite cannot ask of every broker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest

from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.broker.postgresql import PostgreSQLBroker
from postroom.message import Message, new_id
from postroom.testing.clock import ManualClock
from postroom.testing.scene import failure
from tests.servers import url_of
from tests.unit.test_unique import test_what_is_replaced_makes_room, test_what_waits_behind_it_goes_on

__all__ = ["test_what_is_replaced_makes_room", "test_what_waits_behind_it_goes_on"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("postgresql", tmp_path_factory) as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    return f"{server}?schema=t{uuid4().hex[:12]}&migrate=auto"


def unique(key: str, **options: object) -> Message:
    fields = {"topic": "q", "name": "n", "body": b"", "unique": "until_done", "idempotency_key": key} | options
    return Message(id=new_id(), **fields)  # type: ignore[arg-type]


def test_keys_go_with_their_messages(server: str, url: str) -> None:
    """However a message goes: a key without a window is remembered no longer."""

    async def main() -> None:
        clock = ManualClock()
        broker = PostgreSQLBroker(url, clock=clock)
        await broker.connect()
        topic, subscription = Topic(name="q", queue=True), Subscription(name="q", pattern="q")
        await broker.declare([topic], [subscription])
        sent = [unique(f"k{number}", result_ttl=60.0 * (number % 2)) for number in range(6)]
        assert await broker.publish(sent) == [message.id for message in sent]
        assert await broker.jobs.cancel(sent[0].id) == await broker.jobs.cancel(sent[1].id) == "cancelled"
        consumer = await broker.consume("q")
        deliveries = await consumer.receive(10, 1.0)
        outcomes = [Ack(), Ack(), Dead(failure()), Dead(failure())]
        assert await consumer.settle(list(zip(deliveries, outcomes, strict=True))) == [None] * 4
        await clock.advance(61.0)
        await tidy(broker)
        assert keys(server, broker) == ["k4", "k5"]
        assert await broker.discard("q", [message.id for message in sent]) == [sent[4].id, sent[5].id]
        assert keys(server, broker) == []
        await broker.publish([unique("last")])
        await broker.unsubscribe("q")
        assert keys(server, broker) == []
        await broker.close()

    asyncio.run(main())


async def tidy(broker: PostgreSQLBroker) -> None:
    while await broker.link.value("SELECT ~.tidy(100, $1)", broker.moment()):
        pass


def keys(server: str, broker: PostgreSQLBroker) -> list[str]:
    with psycopg.connect(server) as connection:
        found = connection.execute(f"SELECT key FROM {broker.address.schema}.dedup ORDER BY key".encode())
        return [key for (key,) in found]


def test_a_key_is_free_again_when_its_transaction_is_rolled_back(server: str, url: str) -> None:
    """What a transaction of the user replaces stays where it is until that commits."""

    async def main() -> None:
        broker = PostgreSQLBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        first, second, third = (unique("k", unique="until_started", replace=True) for _ in range(3))
        assert await broker.publish([first]) == [first.id]
        with psycopg.connect(server) as connection:
            assert broker.publish_in(connection, [second]) == [second.id]
            consumer = await broker.consume("q")
            # Nobody may start it meanwhile.
            assert await consumer.receive(1, 0.0) == []
            connection.rollback()
            assert broker.publish_in(connection, [third]) == [third.id]
        assert [delivery.message.id for delivery in await consumer.receive(10, 5.0)] == [third.id]
        assert [record.state for record in await broker.jobs.get(first.id)] == ["cancelled"]
        assert await broker.jobs.get(second.id) == []
        await broker.close()

    asyncio.run(main())
