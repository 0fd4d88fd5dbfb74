"""Handlers that take longer than a RabbitMQ server lets anybody hold a message (``consumer_timeout``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import pytest
from services.rabbitmq import RabbitMQServer

from postroom import App, Context
from postroom.broker.amqp import AMQPBroker, shelf, topology
from postroom.broker.amqp.consumer import AMQPConsumer
from postroom.broker.base import Ack, Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.message import Failure, Message, new_id
from tests.conftest import wait_until, working
from tests.faults.proxy import Proxy, proxy_to
from tests.servers import private

TIMEOUT = 5.0
ACK = b"\x00\x3c\x00\x50"
FAILURE = Failure(attempt=1, reason="error", error="ValueError")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        assert isinstance(made, RabbitMQServer)
        # Not by its configuration, in which it takes no tick as short.
        for setting, milliseconds in (("consumer_timeout", 1000 * TIMEOUT), ("channel_tick_interval", 500)):
            made.control("eval", f"application:set_env(rabbit, {setting}, {milliseconds:.0f}).")
        yield made


@pytest.fixture
def url(server: RabbitMQServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(shelf, "HOLD", 1.0)
    monkeypatch.setattr(topology, "SHELF_TIME", 3.0)
    # Nobody kills this server.
    monkeypatch.setattr(shelf, "_YOUNG", 0.3)
    return f"{server.url}?namespace=t{uuid4().hex[:12]}&heartbeat=1"


def shelves(server: RabbitMQServer, url: str) -> list[str]:
    """The queues in which something is held for long."""
    namespace = url.partition("namespace=")[2].partition("&")[0]
    queues = server.control("list_queues", "name").split()
    return [queue for queue in queues if queue.startswith(namespace) and ":held:" in queue]


def message() -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}")


def scenario(url: str, play: Callable[[AMQPBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        broker = AMQPBroker(url)
        await broker.connect()
        try:
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            await play(broker)
        finally:
            await broker.close()

    asyncio.run(main())


async def moved(consumer: Consumer, deliveries: list[Delivery]) -> None:
    """Return once the server waits elsewhere for them to be settled."""

    def places() -> list[object]:
        return [(delivery.receipt.source, delivery.receipt.tag) for delivery in deliveries]

    before = places()
    for _ in range(400):
        await asyncio.sleep(0.05)
        assert await consumer.extend(deliveries) == []
        if not set(before) & set(places()):
            return
    pytest.fail("they were not moved")


def test_a_handler_three_times_as_long_as_the_server_allows(server: RabbitMQServer, url: str) -> None:
    """C3: it runs once, is acked, and leaves nothing behind."""
    runs: list[int] = []
    ends: list[int] = []
    with App(url) as app:

        @app.task
        async def render(ctx: Context) -> None:
            runs.append(ctx.attempt)
            await asyncio.sleep(3 * TIMEOUT)
            ends.append(ctx.attempt)

        with working(app, concurrency=2):
            render.enqueue()
            wait_until(lambda: shelves(server, url), "it was moved", 3 * TIMEOUT)
            wait_until(lambda: ends, "it ended", 4 * TIMEOUT)
        assert runs == ends == [1]
        assert (app.stats()[0].ready, app.dead_letters("default").list()) == (0, [])
        assert shelves(server, url) == []


def test_every_outcome_of_what_was_moved(server: RabbitMQServer, url: str) -> None:
    async def play(broker: AMQPBroker) -> None:
        sent = [message() for _ in range(4)]
        await broker.publish(sent)
        consumer = await broker.consume("q", lease=3.0)
        held: list[Delivery] = []
        while len(held) < len(sent):
            held += await consumer.receive(4, 5.0)
        await moved(consumer, held)
        await moved(consumer, held)
        assert await broker.publish([message()])
        outcomes = [Ack(), Retry(delay=0.0, failure=FAILURE), Dead(FAILURE)]
        assert await consumer.settle(list(zip(held, outcomes, strict=False))) == [None] * 3
        again = [*await consumer.receive(1, 5.0), *await consumer.receive(1, 5.0)]
        assert {(item.attempt, item.suspect) for item in again} == {(1, False), (2, False)}
        (letter,) = await broker.dead_letters("q")
        assert letter.message == held[2].message
        # The fourth goes back uncounted with the consumer, whose end leaves the broker as it was.
        await consumer.close()
        got: list[Delivery] = []
        other = await broker.consume("q")
        while len(got) < 3:
            more = await other.receive(5, 5.0)
            assert more, "something was lost"
            got += more
        assert {item.message.id: item.attempt for item in got}[held[3].message.id] == 1
        assert await other.receive(5, 1.0) == []
        assert shelves(server, url) == []

    scenario(url, play)


def test_a_lease_that_ends_after_the_move(url: str) -> None:
    """C2, C4: the server would hand it to the same consumer at once; it goes back instead, charged once."""

    async def play(broker: AMQPBroker) -> None:
        sent = message()
        await broker.publish([sent])
        consumer, other = await broker.consume("q", lease=2.0), await broker.consume("q")
        (held,) = await consumer.receive(1, 5.0)
        consumer.started([held])
        await moved(consumer, [held])
        began = time.monotonic()
        (again,) = await other.receive(1, 10.0)
        print(f"{time.monotonic() - began:.2f} s after the last extension")
        assert (again.message, again.attempt, again.suspect) == (sent, 2, True)
        assert await consumer.extend([held]) == [held]
        assert await other.settle([(again, Ack())]) == [None]
        assert await other.receive(1, 1.0) == []

    scenario(url, play)


def test_a_lease_that_ends_during_the_move(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy comes for an original that is no longer held: only one of the two remains."""
    monkeypatch.setattr(shelf, "_YOUNG", 2.0)

    async def play(broker: AMQPBroker) -> None:
        sent = message()
        await broker.publish([sent])
        consumer, other = await broker.consume("q", lease=1.3), await broker.consume("q")
        (held,) = await consumer.receive(1, 5.0)
        consumer.started([held])
        (again,) = await other.receive(1, 10.0)
        assert (again.message, again.attempt, again.suspect) == (sent, 2, True)
        assert await other.settle([(again, Ack())]) == [None]
        await consumer.close()
        # Longer than a copy may lie on a shelf.
        assert await other.receive(1, 5.0) == []

    scenario(url, play)


def test_a_lost_channel_takes_only_what_it_held(url: str) -> None:
    async def play(broker: AMQPBroker) -> None:
        await broker.publish([message(), message()])
        consumer = await broker.consume("q", lease=30.0)
        (first,) = await consumer.receive(1, 5.0)
        await moved(consumer, [first])
        (second,) = await consumer.receive(1, 5.0)
        await second.receipt.source.close()
        assert await consumer.extend([first, second]) == [second]
        assert await consumer.settle([(first, Ack())]) == [None]
        (again,) = await consumer.receive(5, 5.0)
        assert (again.message, again.attempt) == (second.message, 2)
        assert await consumer.settle([(again, Ack())]) == [None]
        await consumer.close()

    scenario(url, play)


def test_a_lost_shelf_takes_only_what_it_held(url: str) -> None:
    """C2: what the other channel has handed over meanwhile waits here, and nobody else would ever get it."""

    async def play(broker: AMQPBroker) -> None:
        sent = [message() for _ in range(3)]
        await broker.publish(sent[:1])
        consumer = await broker.consume("q", lease=30.0)
        assert isinstance(consumer, AMQPConsumer)
        (first,) = await consumer.receive(1, 5.0)
        await moved(consumer, [first])
        assert await consumer.receive(2, 0.05) == []
        receiving = asyncio.create_task(consumer.receive(1, 5.0))
        await broker.publish(sent[1:])
        got = await receiving
        async with asyncio.timeout(5.0):
            while consumer.waiting != 1:  # noqa: ASYNC110 -- nobody tells of it
                await asyncio.sleep(0)
        await first.receipt.source.close()
        assert await consumer.extend([first]) == [first]
        while len(got) < 2:
            more = await consumer.receive(1, 3.0)
            assert more, "it is held by nobody and given to nobody"
            got += more
        assert await consumer.settle([(each, Ack()) for each in got]) == [None, None]
        assert [each.message for each in got] == sent[1:]

    scenario(url, play)


@pytest.mark.parametrize("cut", ["held", "between copy and ack"])
def test_the_death_of_who_held_for_long(server: RabbitMQServer, url: str, cut: str) -> None:
    """C4, C7: the server moves it back, charged as one death; if the copy was there already, both are."""

    async def main(proxy: Proxy) -> None:
        dying, living = AMQPBroker(url.replace(f":{server.port}/", f":{proxy.port}/")), AMQPBroker(url)
        await asyncio.gather(dying.connect(), living.connect())
        await dying.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        sent = message()
        await living.publish([sent])
        holder, heir = await dying.consume("q", lease=30.0), await living.consume("q")
        (delivery,) = await holder.receive(1, 5.0)
        holder.started([delivery])
        if cut == "held":
            await moved(holder, [delivery])
            proxy.refusing = True
            proxy.cut()
        else:
            proxy.cut_on = ACK
        died_at = time.monotonic()
        got = await heir.receive(1, 20.0)
        print(f"{time.monotonic() - died_at:.2f} s")
        if cut != "held":
            await heir.settle([(got[0], Ack())])
            got += await heir.receive(1, 20.0)
        assert [(item.message, item.attempt, item.suspect) for item in got] == [(sent, 2, True)] * len(got)
        assert len(got) == (1 if cut == "held" else 2)
        assert await heir.settle([(got[-1], Ack())]) == [None]
        assert await heir.receive(1, 1.0) == []
        await asyncio.gather(dying.close(), living.close())

    with proxy_to(server.port) as proxy:
        asyncio.run(main(proxy))
