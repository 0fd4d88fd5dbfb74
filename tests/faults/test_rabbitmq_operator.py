"""RabbitMQ, and what its operator or the server itself takes away: a channel, a queue, an exchange, room for copies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

import pytest
from services.rabbitmq import RabbitMQServer

from postroom import App
from postroom.broker.amqp import AMQPBroker, confirms
from postroom.broker.amqp.confirms import Answer
from postroom.broker.amqp.consumer import AMQPConsumer
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.ordered import OrderedConsumer
from postroom.broker.base import Ack, Broker, Delivery, Retry, Subscription, Topic
from postroom.errors import BrokerUnavailable, LeaseLost, SubscriptionNotFound
from postroom.message import Failure, Message, new_id
from tests.conftest import wait_until, working
from tests.servers import private

FAILURE = Failure(attempt=1, reason="error", error="ValueError")
TOPICS = [Topic(name="q", queue=True), Topic(name="o", queue=True), Topic(name="t")]
SUBSCRIPTIONS = [
    Subscription(name="q", pattern="q"),
    Subscription(name="o", pattern="o", ordered=True),
    Subscription(name="s", pattern="t"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        assert isinstance(made, RabbitMQServer)
        yield made


@pytest.fixture
def url(server: RabbitMQServer) -> str:
    return f"{server.url}?namespace=t{uuid4().hex[:12]}"


def namespace(url: str) -> str:
    return url.partition("namespace=")[2]


def message(topic: str, key: str | None = None) -> Message:
    return Message(id=new_id(), topic=topic, name="work", body=b"{}", key=key)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[AMQPBroker]:
    broker = AMQPBroker(url)
    await broker.connect()
    try:
        await broker.declare(TOPICS, SUBSCRIPTIONS)
        yield broker
    finally:
        await broker.close()


async def change(broker: AMQPBroker, method: str, **arguments: object) -> None:
    """What an operator does to the server."""
    channel = await broker._reading.channel()
    await channel.call(method, **arguments)
    await channel.close()


@pytest.mark.parametrize("name", ["q", "o"])
def test_a_channel_that_the_server_ends(url: str, name: str) -> None:
    """C5: as after its ``consumer_timeout``. Whoever settles just then is told so by an error of ours."""

    async def main() -> None:
        async with opened(url) as broker:
            await broker.publish([message(name)])
            consumer = await broker.consume(name)
            assert isinstance(consumer, AMQPConsumer)
            (delivery,) = await consumer.receive(1, 10.0)
            assert consumer._source is not None
            consumer._source._channel.raw.basic_ack(99_999)
            with pytest.raises(BrokerUnavailable, match="unknown delivery tag"):
                await consumer.settle([(delivery, Ack())])
            assert [type(each) for each in await consumer.settle([(delivery, Ack())])] == [LeaseLost]

    asyncio.run(main())


def test_a_turn_that_is_lost_and_comes_again_during_a_settlement(url: str) -> None:
    """C14, C5: the tags of the lost channel stand for other messages on the new one."""
    sent = [message("o", "k"), message("o", "k"), message("o", "other")]

    async def main() -> None:
        async with opened(url) as broker:
            await broker.publish(sent)
            consumer = await broker.consume("o")
            assert isinstance(consumer, OrderedConsumer)
            (delivery,) = await consumer.receive(1, 10.0)
            bury, goes_on = consumer._office.bury, asyncio.Event()

            async def late(subscription: str, copies: Sequence[Copy]) -> list[Answer]:
                answers = await bury(subscription, copies)
                await goes_on.wait()
                return answers

            consumer._office.bury = late  # type: ignore[method-assign]
            settling = asyncio.create_task(consumer.settle([(delivery, Retry(delay=0.0, failure=FAILURE))]))
            await asyncio.sleep(0)
            assert consumer._source is not None
            await consumer._source.close()
            got = await consumer.receive(1, 10.0)
            goes_on.set()
            assert [type(each) for each in await settling] == [LeaseLost]
            got += await consumer.receive(5, 10.0)
            assert await consumer.settle([(each, Ack()) for each in got]) == [None] * 2
            got += await consumer.receive(5, 10.0)
            assert [each.message for each in got] == [sent[0], sent[2], sent[1]]
            assert [each.attempt for each in got] == [2, 1, 1]

    asyncio.run(main())


@pytest.mark.parametrize("name", ["q", "o"])
@pytest.mark.parametrize("waits", [True, False])
def test_a_queue_deleted_under_a_live_consumer(url: str, name: str, waits: bool) -> None:
    """An operator's mistake: everybody is told, and once it is declared again the same consumer goes on."""

    async def main() -> None:
        async with opened(url) as broker:
            consumer = await broker.consume(name)
            assert isinstance(consumer, AMQPConsumer)
            receiving = asyncio.create_task(consumer.receive(1, 20.0 if waits else 0.05))
            await until(lambda: consumer._source is not None and bool(consumer._source._windows))
            if not waits:
                assert await receiving == []
                await until(lambda: consumer._source is None or not consumer._source._windows)
            await change(broker, "queue_delete", queue=f"{namespace(url)}.{name}")
            with suppress(BrokerUnavailable, SubscriptionNotFound):
                # A worker receives again after that.
                await receiving
                await consumer.receive(1, 0.1)
            with pytest.raises(SubscriptionNotFound, match="declare it again"):
                await consumer.receive(1, 0.1)
            await broker.declare(TOPICS, SUBSCRIPTIONS)
            sent = message(name)
            assert await broker.publish([sent]) == [sent.id]
            (delivery,) = await consumer.receive(1, 10.0)
            assert (delivery.message, await consumer.settle([(delivery, Ack())])) == (sent, [None])
            channels = len(broker._reading._connection._channels)
            assert channels == 1, "one consumer, and of the deleted queue nothing"

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 -- nobody tells of it
            await asyncio.sleep(0.02)


def test_a_queue_deleted_under_a_live_worker(url: str) -> None:
    """It ends, and says why; the next one declares the queue and goes on."""
    ran: list[int] = []
    with App(url) as app:

        @app.task(queue="q")
        def work(number: int) -> None:
            ran.append(number)

        async def delete(broker: Broker) -> None:
            assert isinstance(broker, AMQPBroker)
            await change(broker, "queue_delete", queue=f"{namespace(url)}.q")

        def live() -> None:
            with working(app) as worker:
                work.enqueue(1)
                wait_until(lambda: ran, "it ran")
                app.thread.call(delete)
                wait_until(lambda: not worker.ready, "it ended")

        with pytest.raises(SubscriptionNotFound, match="'q' is gone from the server"):
            live()
    with App(url) as app:

        @app.task(queue="q", name=work.name)
        def once_more(number: int) -> None:
            ran.append(number)

        with working(app):
            once_more.enqueue(2)
            wait_until(lambda: ran == [1, 2], "it goes on")


@pytest.mark.parametrize("what", ["events", "delay:end", "delay:0", "binding"])
def test_what_was_deleted_is_there_after_a_new_start(url: str, what: str) -> None:
    """C1: without its exchange nothing is taken; without a binding events would be taken and reach nobody."""

    async def main() -> None:
        async with opened(url) as broker:
            if what == "binding":
                name = namespace(url)
                await change(broker, "queue_unbind", queue=f"{name}.s", exchange=f"{name}:events", routing_key="t")
            else:
                await change(broker, "exchange_delete", exchange=f"{namespace(url)}:{what}")
        async with opened(url) as broker:
            sent = message("t")
            assert await broker.publish([sent]) == [sent.id]
            consumer = await broker.consume("s")
            (delivery,) = await consumer.receive(1, 5.0)
            assert await consumer.settle([(delivery, Retry(delay=0.05, failure=FAILURE))]) == [None]
            (delivery,) = await consumer.receive(1, 5.0)
            assert (delivery.message, delivery.attempt) == (sent, 2)

    asyncio.run(main())


def test_a_queue_that_never_answers(server: RabbitMQServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15, C9: as without a majority of its nodes. Others go on, and what nobody waits for any more is not kept."""
    monkeypatch.setattr(confirms, "CONFIRM_PATIENCE", 2.0)

    async def control(what: str) -> None:
        await asyncio.to_thread(server.control, "eval", f"sys:{what}(whereis('%2F_{namespace(url)}.q')).")

    async def main() -> None:
        async with opened(url) as broker:
            # The server asks whom it can reach when a channel first sends to a queue.
            silent, other = message("q"), message("o")
            await broker.publish([silent])
            await control("suspend")
            try:
                answers = await broker.publish([silent, other])
                assert (type(answers[0]), answers[1]) == (BrokerUnavailable, other.id)
                with pytest.raises(BrokerUnavailable, match="not confirmed"):
                    await broker.publish([silent])
                assert not broker._publisher._waiting
            finally:
                await control("resume")
            assert await broker.publish([silent]) == [silent.id]
            consumer = await broker.consume("q")
            assert {each.message.id for each in await consumer.receive(5, 10.0)} == {silent.id}

    asyncio.run(main())


def test_suspects_are_not_charged_for_a_server_short_of_memory(server: RabbitMQServer, url: str) -> None:
    """C7: whoever waits for its turn is given back by a copy, and no copy can be stored now."""
    sent = [message("q") for _ in range(40)]

    async def scenario(broker: AMQPBroker, dying: AMQPBroker) -> None:
        held: list[Delivery] = []
        holder = await dying.consume("q")
        while len(held) < len(sent):
            held += await holder.receive(len(sent), 10.0)
        await short_of_memory(server, broker)
        dying._reading._connection._terminate_stream(ConnectionResetError())
        heir = await broker.consume("q")
        attempts: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        enough = loop.time() + 12.0
        while loop.time() < enough:
            for delivery in await heir.receive(50, 1.0):
                attempts[delivery.message.id] = delivery.attempt
                assert await heir.settle([(delivery, Ack())]) == [None]
                await asyncio.sleep(0.5)
        assert len(attempts) > 10, "nobody went on"
        await plenty_of_memory(server)
        while len(attempts) < len(sent):
            found = await heir.receive(50, 20.0)
            assert found
            attempts |= {each.message.id: each.attempt for each in found}
            await heir.settle([(each, Ack()) for each in found])
        assert set(attempts.values()) == {2}

    async def main() -> None:
        async with opened(url) as broker, opened(url) as dying:
            await broker.publish(sent)
            try:
                await scenario(broker, dying)
            finally:
                await plenty_of_memory(server)

    asyncio.run(main())


def test_what_cannot_be_stored_again_comes_back_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C2: a worker that no longer takes gives back what it was handed over in advance, and no copy of it is stored."""
    sent = [message("q") for _ in range(2)]

    async def main() -> None:
        async with opened(url) as broker, opened(url) as other:
            consumer = await broker.consume("q")
            assert isinstance(consumer, AMQPConsumer)
            assert await consumer.receive(2, 0.05) == []
            await broker.publish(sent)
            (first,) = await consumer.receive(1, 10.0)
            await until(lambda: consumer.waiting == 1)

            async def fails(*_: object) -> list[Answer]:
                raise BrokerUnavailable("not now")

            monkeypatch.setattr(consumer._office, "put", fails)
            (second,) = await (await other.consume("q")).receive(2, 10.0)
            assert (second.message, second.attempt, second.suspect) == (sent[1], 2, True)
            assert await consumer.settle([(first, Ack())]) == [None]

    asyncio.run(main())


async def short_of_memory(server: RabbitMQServer, broker: AMQPBroker) -> None:
    """Return once the server has told the broker."""
    await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.000001")
    # It tells whoever publishes, and stores this one later.
    publishing = asyncio.create_task(broker.publish([message("t")]))
    await until(lambda: broker._publisher.is_blocked)
    publishing.cancel()


async def plenty_of_memory(server: RabbitMQServer) -> None:
    await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.4")
