"""RabbitMQ, and connections that end, or are given up, at an unlucky moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pika
import pytest
from services.base import Server

from postroom.broker.amqp import AMQPBroker, letters
from postroom.broker.amqp.confirms import Answer, Post, Publisher
from postroom.broker.amqp.link import Channel
from postroom.broker.base import Dead, Release, Subscription, Topic
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message
from tests.faults.proxy import proxy_to
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        yield made


def url(port: int, namespace: str) -> str:
    return f"amqp://guest:guest@127.0.0.1:{port}/?namespace={namespace}&heartbeat=1"


@asynccontextmanager
async def opened(server: Server, namespace: str) -> AsyncIterator[AMQPBroker]:
    """Connected, and with a queue ``q``."""
    broker = AMQPBroker(url(server.port, namespace))
    await broker.connect()
    try:
        await declare(broker, "q")
        yield broker
    finally:
        await broker.close()


async def declare(broker: AMQPBroker, name: str) -> None:
    await broker.declare([Topic(name=name, queue=True)], [Subscription(name=name, pattern=name)])


@pytest.mark.parametrize("step", [b"PLAIN", b"\x00\x0a\x00\x28"], ids=["password", "virtual host"])
def test_a_greeting_that_is_cut_off_is_no_refusal(server: Server, step: bytes) -> None:
    """C17: as when a server ends while a worker connects again. A wrong password would end the worker for good."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            proxy.cut_on = step
            broker = AMQPBroker(url(proxy.port, "x"))
            with pytest.raises(BrokerUnavailable):
                await broker.connect()
            proxy.cut_on = None
            await broker.connect()
            await broker.close()

    asyncio.run(main())


def test_who_has_lost_the_lock_declares_nothing(server: Server) -> None:
    """Else it would write what it had read before, and another's queue would be known to nobody."""
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        other = AMQPBroker(url(server.port, namespace))
        await other.connect()
        with proxy_to(server.port) as proxy:
            broker = AMQPBroker(url(proxy.port, namespace))
            await broker.connect()
            build = broker._directory.build

            async def interrupted(*arguments: Sequence[object]) -> None:
                await build(*arguments)  # type: ignore[arg-type]
                proxy.cut()
                await declare(other, "theirs")

            broker._directory.build = interrupted  # type: ignore[assignment, method-assign]
            with pytest.raises(BrokerUnavailable):
                await declare(broker, "ours")
            broker._directory.build = build  # type: ignore[method-assign]
            await declare(broker, "ours")
            assert {one.name for one in await other.stats()} == {"ours", "theirs"}
            await broker.close()
        await other.close()

    asyncio.run(main())


def test_who_was_shown_an_old_version_declares_nothing(server: Server) -> None:
    """A death has left two, and another was just looking at the newer one."""
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        broker, other = AMQPBroker(url(server.port, namespace)), AMQPBroker(url(server.port, namespace))
        await broker.connect()
        await other.connect()
        await declare(broker, "old")
        channel = await other._reading.channel()
        found = await channel.get(f"{namespace}:topology")
        assert found is not None
        newer = pika.BasicProperties(headers={"version": 2}, delivery_mode=2)
        channel.raw.basic_publish("", f"{namespace}:topology", found[2].replace(b'"old"', b'"newer"'), newer)
        await channel.close()
        reading = await other._reading.channel()
        await _hold(reading, f"{namespace}:topology", b"newer")
        build = broker._directory.build

        async def late(*arguments: Sequence[object]) -> None:
            await reading.close()
            await build(*arguments)  # type: ignore[arg-type]

        broker._directory.build = late  # type: ignore[assignment, method-assign]
        with pytest.raises(BrokerUnavailable, match="changed since"):
            await declare(broker, "third")
        broker._directory.build = build  # type: ignore[method-assign]
        await declare(broker, "third")
        assert set((await other._directory.refresh()).subscriptions) == {"newer", "third"}
        await broker.close()
        await other.close()

    asyncio.run(main())


async def _hold(channel: Channel, queue: str, text: bytes) -> None:
    """Hold the message with ``text``; all others go back."""
    others = []
    while (found := await channel.get(queue)) is not None and text not in found[2]:
        others.append(found[0].delivery_tag)
    assert found is not None
    for tag in others:
        channel.raw.basic_nack(tag)


def test_what_is_declared_already_waits_for_no_lock(server: Server) -> None:
    """Many workers start at once: one after the other they would wait for longer than any of them has patience."""
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        broker, other = AMQPBroker(url(server.port, namespace)), AMQPBroker(url(server.port, namespace))
        await broker.connect()
        await other.connect()
        await declare(broker, "q")
        lock = await broker._directory._lock()
        await asyncio.wait_for(declare(other, "q"), 20.0)
        await lock.call("queue_delete", queue=f"{namespace}:topology:lock")
        await lock.call("queue_delete", queue=f"{namespace}.q")
        await lock.close()
        await declare(other, "q")
        assert await other.publish([Message(id="1", topic="q", name="n", body=b"1")]) == ["1"]
        await broker.close()
        await other.close()

    asyncio.run(main())


class Slow:
    """A publisher whose messages are stored later than it says, or said so later than they are stored."""

    is_blocked = False

    def __init__(self, publisher: Publisher, *, says_first: bool) -> None:
        self._publisher = publisher
        self._says_first = says_first
        self.tasks: set[asyncio.Task[list[Answer]]] = set()

    async def send(self, posts: Sequence[Post]) -> list[Answer]:
        if not self._says_first:
            answers = await self._publisher.send(posts)
            await asyncio.sleep(0.5)
            return answers
        self.tasks.add(asyncio.create_task(self._later(posts)))
        return ["stored"] * len(posts)

    async def _later(self, posts: Sequence[Post]) -> list[Answer]:
        await asyncio.sleep(1.0)
        return await self._publisher.send(posts)


def test_a_pause_is_not_the_end_of_the_letters(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow server has not handed over yet would be missing, and the mark of the end be left behind."""
    monkeypatch.setattr(letters, "_SILENCE", 0.2)
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        async with opened(server, namespace) as broker:
            await broker.publish([Message(id="1", topic="q", name="n", body=b"1")])
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 10.0)
            assert await consumer.settle([(delivery, Dead(Failure(attempt=1, reason="error")))]) == [None]
            slow = Slow(broker._publisher, says_first=True)
            broker._letters._publisher = slow  # type: ignore[assignment]
            assert [letter.message.id for letter in await broker.dead_letters("q")] == ["1"]
            await asyncio.gather(*slow.tasks)
            assert [one.dead for one in await broker.stats()] == [1]

    asyncio.run(main())


def test_a_consumer_that_closes_lets_settlements_end(server: Server) -> None:
    """C16: the copy is stored, and its original would go back beside it. The server takes its time to answer."""
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        async with opened(server, namespace) as broker:
            await broker.publish([Message(id="1", topic="q", name="n", body=b"1")])
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 10.0)
            broker._office._publisher = Slow(broker._publisher, says_first=False)  # type: ignore[assignment]
            channel = consumer._source._channel
            call = channel.call

            async def late(method: str, **arguments: bool) -> None:
                await asyncio.sleep(0.3 if method == "flow" else 0.0)
                await call(method, **arguments)

            channel.call = late
            settling = asyncio.create_task(consumer.settle([(delivery, Release(0.0))]))
            await asyncio.sleep(0)
            await consumer.close()
            assert await settling == [None]
            following = await broker.consume("q")
            assert [one.attempt for one in await following.receive(5, 10.0)] == [1]
            assert await following.receive(5, 1.0) == []

    asyncio.run(main())


def test_what_is_given_up_leaves_nothing_open(server: Server) -> None:
    """A connection that was still being made, and a channel: a server has only so many of both."""
    namespace = f"t{uuid4().hex[:8]}"

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            proxy.silent = True
            for _ in range(3):
                hasty = AMQPBroker(url(proxy.port, namespace))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(hasty.connect(), 0.2)
            proxy.silent = False
            await _until(lambda: not proxy.connections, "the connections are closed")
        async with opened(server, namespace) as broker:
            for steps in range(20):
                consumer = await broker.consume("q")
                receiving = asyncio.create_task(consumer.receive(1, 5.0))
                for _ in range(steps):
                    await asyncio.sleep(0)
                receiving.cancel()
                await asyncio.wait([receiving])
                await consumer.close()
            channels = broker._reading._connection._channels
            await _until(lambda: not channels, "the channels are closed")

    asyncio.run(main())


@pytest.mark.parametrize("rubbish", [False, True], ids=["gone", "unreadable"])
def test_an_ordered_turn_is_passed_on_whatever_its_notes(server: Server, rubbish: bool) -> None:
    """Their queue was deleted, or somebody has written to it: some attempts count anew, but all goes on."""
    namespace = f"t{uuid4().hex[:8]}"
    subscription = Subscription(name="o", pattern="o", ordered=True)

    async def main() -> None:
        broker = AMQPBroker(url(server.port, namespace))
        await broker.connect()
        await broker.declare([Topic(name="o", queue=True)], [subscription])
        await broker.publish([Message(id="1", topic="o", name="n", body=b"1", key="k")])
        consumer = await broker.consume("o")
        assert [one.message.id for one in await consumer.receive(1, 10.0)] == ["1"]
        channel = await broker._reading.channel()
        if rubbish:
            await consumer.close()
            channel.raw.basic_publish("", f"{namespace}.o:state", b"\xff")
            await channel.close()
        else:
            await channel.call("queue_delete", queue=f"{namespace}.o:state")
            await channel.close()
            await consumer.close()
            await broker.declare([Topic(name="o", queue=True)], [subscription])
        following = await broker.consume("o")
        assert [one.message.id for one in await following.receive(1, 10.0)] == ["1"]
        await broker.close()

    asyncio.run(main())


async def _until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)
