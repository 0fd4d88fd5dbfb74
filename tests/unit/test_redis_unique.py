"""Unique jobs on Redis: what the suite cannot ask of every broker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis import Redis

from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.message import Message, new_id
from postroom.testing.scene import failure
from tests.servers import url_of
from tests.unit.test_unique import test_what_is_replaced_makes_room, test_what_waits_behind_it_goes_on

__all__ = ["test_what_is_replaced_makes_room", "test_what_waits_behind_it_goes_on"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("redis", tmp_path_factory) as url:
        yield url


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def url(server: str, namespace: str) -> str:
    return f"{server}?namespace={namespace}"


def test_keys_go_with_their_messages(server: str, url: str, namespace: str) -> None:
    """However a message goes: a key without a window is remembered no longer."""

    def unique(key: str, **options: object) -> Message:
        fields = {"topic": "t", "name": "n", "body": b"", "unique": "until_done", "idempotency_key": key} | options
        return Message(id=new_id(), **fields)  # type: ignore[arg-type]

    def keys() -> list[str]:
        with Redis.from_url(server, decode_responses=True) as client:
            found = client.scan_iter(f"{{{namespace}}}:once:t:*")
            return sorted(key.rpartition(":")[2] for key in found if client.ttl(key) == -1)

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        subscriptions = [Subscription(name=name, pattern="t") for name in ("one", "two")]
        await broker.declare([Topic(name="t")], subscriptions)
        sent = [unique(f"k{number}", result_ttl=60.0 * (number % 2)) for number in range(6)]
        assert await broker.publish([*sent, unique("by a window", unique=None)])
        assert keys() == [f"k{number}" for number in range(6)]
        assert [await broker.jobs.cancel(message.id) for message in sent[:2]] == ["cancelled"] * 2
        assert keys() == ["k2", "k3", "k4", "k5"]
        for subscription in ("one", "two"):
            consumer = await broker.consume(subscription)
            deliveries = await consumer.receive(4, 1.0)
            outcomes = [Ack(), Ack(), Dead(failure()), Dead(failure())]
            assert await consumer.settle(list(zip(deliveries, outcomes, strict=True))) == [None] * 4
            assert keys() == (["k2", "k3", "k4", "k5"] if subscription == "one" else ["k4", "k5"])
        assert await broker.discard("one", [sent[4].id]) == await broker.discard("two", [sent[4].id]) == [sent[4].id]
        assert keys() == ["k5"]
        await broker.publish([unique("last")])
        for subscription in ("one", "two"):
            await broker.unsubscribe(subscription)
        assert keys() == []
        await broker.close()

    asyncio.run(main())
