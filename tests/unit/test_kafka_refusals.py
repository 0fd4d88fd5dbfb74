"""A server that says no, or nothing, at the worst moment: what was under way goes on as soon as it says yes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from services.base import Server

from postroom.broker.base import Ack
from postroom.broker.kafka import KafkaBroker, fetcher, member
from postroom.errors import BrokerUnavailable
from postroom.message import Message, new_id
from tests.kafka import opened, url_of
from tests.servers import private

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


@asynccontextmanager
async def waiting(server: Server) -> AsyncIterator[KafkaBroker]:
    """A broker with a message in its queue ``q``."""
    async with opened(url_of(server), "q") as broker:
        await broker.publish([Message(id=new_id(), topic="q", name="work", body=b"{}")])
        yield broker


def refusing(monkeypatch: pytest.MonkeyPatch, module: Any, method: str, code: int, *, times: int = 1) -> dict[str, int]:
    """The client of ``module`` answers so many calls of a method with an error. Returns how many are left."""
    left = {"left": times}

    class Refusing(Consumer):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return refuse if name == method and left["left"] else found

    def refuse(*_: object, **__: object) -> None:
        left["left"] -= 1
        raise KafkaException(KafkaError(code))

    monkeypatch.setattr(module, "Consumer", Refusing)
    return left


def test_a_share_whose_state_is_not_told_is_asked_for_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: nobody else would notice that this process has partitions and does nothing with them."""

    async def scenario() -> None:
        async with waiting(server) as broker:
            left = refusing(monkeypatch, member, "committed", KafkaError._TIMED_OUT)
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 30.0)
            assert left == {"left": 0}
            assert await consumer.settle([(delivery, Ack())]) == [None]

    asyncio.run(scenario())


def test_what_cannot_be_fetched_at_first_is_fetched_later(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: the server may go away just when the partitions have been shared out."""

    async def scenario() -> None:
        async with waiting(server) as broker:
            left = refusing(monkeypatch, fetcher, "list_topics", KafkaError._TRANSPORT)
            consumer = await broker.consume("q")
            assert len(await consumer.receive(1, 30.0)) == 1
            assert left == {"left": 0}

    asyncio.run(scenario())


def test_a_settle_that_is_refused_can_be_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has taken a permission away, and gives it back: the worker still has what it held."""

    async def scenario() -> None:
        async with waiting(server) as broker:
            left = refusing(monkeypatch, member, "commit", KafkaError.GROUP_AUTHORIZATION_FAILED, times=0)
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 30.0)
            left["left"] = 1
            async with asyncio.timeout(10):
                with pytest.raises(BrokerUnavailable, match=r"(?i)group authorization"):
                    await consumer.settle([(delivery, Ack())])
            assert await consumer.settle([(delivery, Ack())]) == [None]

    asyncio.run(scenario())


def test_a_share_out_that_fails_says_nothing_of_the_one_before(server: Server) -> None:
    """C2: what was ours may be somebody else's by then, and his word must not be overwritten."""

    async def scenario() -> None:
        async with opened(f"{url_of(server)}&handover=0", "q") as broker:
            await broker.publish([Message(id=new_id(), topic="q", name="work", body=b"{}")])
            consumer = await broker.consume("q")
            assert await consumer.receive(1, 10.0)
            assert len(await consumer.hub.revoked()) == 1
            assert await consumer.hub.revoked() == []

    asyncio.run(scenario())


def test_what_is_due_during_a_rebalance_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: no busy loop."""

    async def scenario() -> None:
        async with opened(f"{url_of(server)}&handover=0", "q") as broker:
            due = time.time() + 1.0
            await broker.publish([Message(id=new_id(), topic="q", name="work", body=b"{}", not_before=due)])
            consumer = await broker.consume("q")
            hub = consumer.hub
            await hub.joined()
            while hub.next_due() is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await hub.revoked()
            looks: list[object] = []
            claim = hub.claim
            monkeypatch.setattr(hub, "claim", lambda *asked: looks.append(asked) or claim(*asked))
            assert await consumer.receive(1, 2.0) == []
            assert len(looks) < 10

    asyncio.run(scenario())


def test_a_partition_that_does_not_answer_has_no_offset(server: Server) -> None:
    """C2: a subscription would begin at its time, far beyond all messages."""

    async def scenario() -> None:
        async with opened(url_of(server), "q") as broker:
            topic = broker.options.names.topic("q")
            assert await broker._reader.call(lambda reader: reader.offsets_at(topic, 1, time.time())) == [0]
            with pytest.raises(BrokerUnavailable, match=r"(?i)unknown partition"):
                await broker._reader.call(lambda reader: reader.offsets_at(topic, 2, time.time()))

    asyncio.run(scenario())
