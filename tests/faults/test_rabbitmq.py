"""RabbitMQ under fault: workers and servers that die, freeze, or lose their answers; a server short of memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import msgspec
import pika
import pytest
from services.rabbitmq import RabbitMQServer

from postroom.broker.amqp import AMQPBroker
from postroom.broker.amqp.consumer import AMQPConsumer
from postroom.broker.amqp.ordered import WINDOW, OrderedConsumer
from postroom.broker.amqp.topology import BACKSTOP, version_of
from postroom.broker.base import Ack, Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.errors import BrokerUnavailable, LeaseLost, QueueFull
from postroom.message import Failure, Message, new_id
from tests.faults.processes import Stage, stage
from tests.faults.proxy import Proxy, proxy_to
from tests.faults.scenarios import (
    few_starts_and_twins,
    freeze_a_worker,
    kill_now_and_then,
    kill_the_server_under_load,
    killers_among_innocents,
    message,
    ready,
    refused_without_a_busy_loop,
    seconds_to_redelivery,
    silence_the_server,
)
from tests.servers import private

HEARTBEAT = 1
FAILURE = Failure(attempt=1, reason="error", error="ValueError")
ACK = b"\x00\x3c\x00\x50"
"""Class 60, method 80: how ``basic.ack`` begins (AMQP 0-9-1, 1.8.3.13)."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        assert isinstance(made, RabbitMQServer)
        yield made


@pytest.fixture
def url(server: RabbitMQServer) -> str:
    return f"{server.url}?namespace=t{uuid4().hex[:12]}&heartbeat={HEARTBEAT}"


@pytest.fixture
def faults(url: str, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, lease=5.0, url=url) as made:
        yield made


# Workers


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3."""
    killing = kill_now_and_then(faults, tasks, jobs=10_000, pause=0.02, workers=2, concurrency=20, kills=5, every=1000)
    # 20 that ran and at most 50 taken in advance, by windows that are half as large again: not whatever was there.
    apart = {record["id"] for record in faults.records() if record["parent"] in killing.workers}
    assert len(apart) <= 5 * 150, "more was charged than a worker needs to hold"


@pytest.mark.timed
def test_redelivery_after_a_kill(faults: Stage, tasks: ModuleType) -> None:
    """C4: the server sees the end of the connection."""
    assert seconds_to_redelivery(faults, tasks) <= AMQPBroker.capabilities.death_notice + 1.5


@pytest.mark.timeout(240)
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b, C7.

    Without notes of starts all that a dead process held is charged. So a killer that was only held when another one
    struck has more deaths than starts.
    """
    few_starts_and_twins(killers_among_innocents(faults, tasks))


@pytest.mark.timed
def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: it does not answer heartbeats."""
    assert freeze_a_worker(faults, tasks, pause=3.0) <= 3 * HEARTBEAT + 3


# The server


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_server_loses_nothing(server: RabbitMQServer, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17. Again runs only what was in somebody's hands."""
    tasks.app.stats()
    # What a server has not yet written of the names of its queues is told under "Limits".
    time.sleep(2.0)
    ids = kill_the_server_under_load(server, faults, tasks, jobs=1500, workers=1, concurrency=20, away=0.0)
    again = sum(faults.counts("start").values()) - len(ids)
    # What ran, what waited for a slot, and what was done but whose ack had not yet been written.
    assert again <= 4 * 20, again


@pytest.mark.slow
def test_what_is_published_just_after_a_restart_is_kept(server: RabbitMQServer) -> None:
    """C2: a server takes events before it has recovered the streams of those that retain them."""

    async def main() -> None:
        broker = AMQPBroker(server.url)
        await broker.connect()
        await broker.declare([Topic(name="kept", retention=3600.0)], [])
        # What a server has not yet written of the names of its queues is told under "Limits".
        await asyncio.sleep(2.0)
        sent: list[str] = []
        for _ in range(2):
            server.restart()
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                event = Message(id=new_id(), topic="kept", name="happened", body=b"1", created_at=time.time())
                with suppress(BrokerUnavailable):
                    sent += [told for told in await broker.publish([event]) if isinstance(told, str)]
                await asyncio.sleep(0.01)
        late = Subscription(name="late", pattern="kept", start="earliest")
        await broker.declare([], [late])
        consumer = await broker.consume("late")
        seen: set[str] = set()
        while deliveries := await consumer.receive(100, 3.0):
            seen |= {delivery.message.id for delivery in deliveries}
            await consumer.settle([(delivery, Ack()) for delivery in deliveries])
        await broker.close()
        assert sent
        assert set(sent) <= seen, f"{len(set(sent) - seen)} of {len(sent)} are missing"

    asyncio.run(main())


def through_a_proxy(url: str, port: int, scenario: Callable[[AMQPBroker, Proxy], Awaitable[None]]) -> None:
    async def main() -> None:
        with proxy_to(port) as proxy:
            broker = await ready(AMQPBroker(url.replace(f":{port}/", f":{proxy.port}/")))
            await broker.publish([message()])
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 5.0)
            assert await consumer.settle([(delivery, Ack())]) == [None]
            await consumer.close()
            await scenario(broker, proxy)
            await broker.close()

    asyncio.run(main())


async def everything(consumer: Consumer) -> list[Delivery]:
    """What comes until nothing has come for a second, acked."""
    got: list[Delivery] = []
    while more := await consumer.receive(10, 1.0 if got else 10.0):
        await consumer.settle([(delivery, Ack()) for delivery in more])
        got += more
    return got


def test_a_lost_answer_to_a_publish(server: RabbitMQServer, url: str) -> None:
    """I3: stored, but not confirmed; the caller is told, publishes it again, and both copies have one id."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        sent = [message() for _ in range(10)]
        proxy.lose_replies = 1
        with pytest.raises(BrokerUnavailable, match="not confirmed"):
            await broker.publish(sent)
        assert await broker.publish(sent) == [item.id for item in sent]
        got = [delivery.message.id for delivery in await everything(await broker.consume("q"))]
        assert set(got) == {item.id for item in sent}
        assert len(got) > 10, "nothing was stored the first time: nothing was tested"

    through_a_proxy(url, server.port, scenario)


@pytest.mark.parametrize(
    "outcome", [Ack(), Retry(delay=0.0, failure=FAILURE), Dead(FAILURE)], ids=["ack", "retry", "dead"]
)
def test_a_connection_lost_before_the_ack(server: RabbitMQServer, url: str, outcome: Ack | Retry | Dead) -> None:
    """Between copy and ack: the message is in both places, and nobody is told that it is settled."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        await broker.publish([message()])
        consumer = await broker.consume("q")
        (delivery,) = await consumer.receive(1, 5.0)
        proxy.cut_on = ACK
        try:
            (answer,) = await consumer.settle([(delivery, outcome)])
        except BrokerUnavailable:
            (answer,) = await consumer.settle([(delivery, outcome)])
        assert isinstance(answer, LeaseLost)
        proxy.cut_on = None
        got = await everything(consumer)
        assert {item.message.id for item in got} == {delivery.message.id}
        # Once it came back from a holder that was lost, once as the copy.
        assert [item.attempt for item in got] == [2] * (2 if isinstance(outcome, Retry) else 1)
        assert len(await broker.dead_letters("q")) == (1 if isinstance(outcome, Dead) else 0)

    through_a_proxy(url, server.port, scenario)


def test_a_connection_lost_in_a_redrive(server: RabbitMQServer, url: str) -> None:
    """I14: between copy and ack of a redrive, it is in both places."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        sent = message()
        await broker.publish([sent])
        consumer = await broker.consume("q")
        (delivery,) = await consumer.receive(1, 5.0)
        assert await consumer.settle([(delivery, Dead(FAILURE))]) == [None]
        proxy.cut_on = ACK
        with pytest.raises(BrokerUnavailable):
            await broker.redrive("q", [sent.id])
        proxy.cut_on = None
        (again,) = await everything(consumer)
        assert again.message == sent
        assert [letter.message for letter in await broker.dead_letters("q")] == [sent]

    through_a_proxy(url, server.port, scenario)


def test_two_letters_of_one_message_are_one(server: RabbitMQServer, url: str) -> None:
    """I14: it was buried and came back, and died once more. It is listed once, and goes as one."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        twice, once = message(), message()
        consumer = await broker.consume("q")
        await broker.publish([twice])
        proxy.cut_on = ACK
        (delivery,) = await consumer.receive(1, 5.0)
        assert isinstance(await unsettled(consumer, delivery), LeaseLost)
        proxy.cut_on = None
        (again,) = await consumer.receive(1, 10.0)
        await broker.publish([once])
        (other,) = await consumer.receive(1, 5.0)
        assert await consumer.settle([(other, Dead(FAILURE)), (again, Dead(FAILURE))]) == [None, None]
        for limit in (1, 2, 10):
            assert await pages(broker, limit) == [twice.id, once.id]
        assert await broker.redrive("q", [twice.id]) == [twice.id]
        assert await pages(broker, 10) == [once.id]
        assert [each.message.id for each in await everything(consumer)] == [twice.id]

    async def unsettled(consumer: Consumer, delivery: Delivery) -> object:
        try:
            (answer,) = await consumer.settle([(delivery, Dead(FAILURE))])
        except BrokerUnavailable:
            (answer,) = await consumer.settle([(delivery, Dead(FAILURE))])
        return answer

    async def pages(broker: AMQPBroker, limit: int) -> list[str]:
        found: list[str] = []
        for _ in range(5):
            page = await broker.dead_letters("q", after=found[-1] if found else None, limit=limit)
            found += [letter.message.id for letter in page]
        return found

    through_a_proxy(url, server.port, scenario)


def test_what_a_slow_server_sends_too_late_is_not_lost(server: RabbitMQServer, url: str) -> None:
    """C7: it was on its way when it was no longer wanted, and nobody has tried it."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        other = AMQPBroker(url)
        await other.connect()
        consumer = await broker.consume("q")
        assert isinstance(consumer, AMQPConsumer)
        assert await consumer.receive(5, 0.1) == []
        source = consumer._source
        assert source is not None
        sent = [message() for _ in range(3)]
        proxy.silent = True
        await other.publish(sent)
        async with asyncio.timeout(5):
            while source._windows:  # noqa: ASYNC110 -- nobody tells of it
                await asyncio.sleep(0.01)
        proxy.silent = False
        got = await everything(consumer)
        assert [each.message.id for each in got] == [each.id for each in sent]
        assert [each.attempt for each in got] == [1, 1, 1]
        assert source.is_alive
        await other.close()

    through_a_proxy(url, server.port, scenario)


@pytest.mark.timed
def test_a_silent_server_is_noticed(server: RabbitMQServer, url: str) -> None:
    """C17: half-open, as after a network failure: told within a few heartbeats, and used again when it answers."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        # pika looks for silence every heartbeat plus five seconds.
        await silence_the_server(broker, proxy, within=20)

    through_a_proxy(url, server.port, scenario)


def test_a_connection_lives_while_nothing_happens(url: str) -> None:
    """Heartbeats are answered and seen; pika looks for them every heartbeat plus five seconds."""

    async def main() -> None:
        broker = await ready(AMQPBroker(url))
        consumer = await broker.consume("q", lease=60.0)
        await broker.publish([message()])
        (delivery,) = await consumer.receive(1, 5.0)
        assert await consumer.receive(1, 15.0) == []
        assert await consumer.settle([(delivery, Ack())]) == [None]
        await broker.close()

    asyncio.run(main())


def test_a_crowd_of_suspects_is_charged_once(server: RabbitMQServer, url: str) -> None:
    """C7: who runs one of many suspects and dies takes a few with it, not all that wait for their turn."""

    async def scenario(dying: AMQPBroker, proxy: Proxy) -> None:
        living = AMQPBroker(url)
        await living.connect()
        sent = [message() for _ in range(40)]
        await living.publish(sent)
        holder = await dying.consume("q")
        held: list[Delivery] = []
        while len(held) < len(sent):
            held += await holder.receive(40, 5.0)
        proxy.cut()
        with pytest.raises(BrokerUnavailable):
            await holder.receive(40, 5.0)
        assert len(await holder.receive(40, 5.0)) == 1
        assert isinstance(holder, AMQPConsumer)
        for _ in range(100):
            await asyncio.sleep(0.05)
            if not holder._tasks:
                break
        proxy.cut()
        got: dict[str, int] = {}
        heir = await living.consume("q")
        while len(got) < len(sent):
            (delivery,) = await heir.receive(1, 10.0)
            got[delivery.message.id] = delivery.attempt
            assert await heir.settle([(delivery, Ack())]) == [None]
        assert set(got.values()) == {2, 3}
        assert sum(attempt == 3 for attempt in got.values()) <= 6, got
        await living.close()

    through_a_proxy(url, server.port, scenario)


def test_who_reads_what_is_declared_takes_it_from_nobody(url: str) -> None:
    """C10: its message is held by a reader that is slow, or frozen; nobody takes that for an empty server."""

    async def main() -> None:
        first, reader, second = AMQPBroker(url), AMQPBroker(url), AMQPBroker(url)
        for broker in (first, reader, second):
            await broker.connect()
        await first.declare([Topic(name="one", queue=True)], [Subscription(name="one", pattern="one")])
        channel = await reader._reading.channel()
        assert await channel.get(reader._address.internal("topology")) is not None
        declaring = asyncio.create_task(
            second.declare([Topic(name="two", queue=True)], [Subscription(name="two", pattern="two")])
        )
        with pytest.raises(BrokerUnavailable, match="somebody else is reading"):
            await first.stats()
        assert not declaring.done()
        await channel.close()
        await declaring
        for broker in (first, reader, second):
            assert [each.name for each in await broker.stats()] == ["one", "two"]
            await broker.close()

    asyncio.run(main())


def test_an_ordered_holder_that_dies(server: RabbitMQServer, url: str) -> None:
    """C14, C7: the next one has the messages in their order, knows of earlier failures, and charges what was tried."""
    first, second = (message(key="k") for _ in range(2))
    ordered = [Topic(name="o", queue=True)], [Subscription(name="o", pattern="o", ordered=True)]
    sent = [msgspec.structs.replace(item, topic="o") for item in (first, second)]

    async def scenario(dying: AMQPBroker, proxy: Proxy) -> None:
        living = AMQPBroker(url)
        await living.connect()
        await living.declare(*ordered)
        await living.publish(sent)
        holder, heir = await dying.consume("o"), await living.consume("o")
        (delivery,) = await holder.receive(5, 5.0)
        assert await holder.settle([(delivery, Retry(delay=0.0, failure=FAILURE))]) == [None]
        (delivery,) = await holder.receive(5, 5.0)
        assert (delivery.message, delivery.attempt, delivery.suspect) == (sent[0], 2, False)
        proxy.cut()
        (delivery,) = await heir.receive(5, 10.0)
        assert (delivery.message, delivery.attempt, delivery.suspect) == (sent[0], 3, True)
        assert await heir.settle([(delivery, Dead(FAILURE))]) == [None]
        (letter,) = await living.dead_letters("o")
        assert [failure.reason for failure in letter.failures] == ["error", "worker_lost", "error"]
        (delivery,) = await heir.receive(5, 5.0)
        # It had only waited behind its key.
        assert (delivery.message, delivery.attempt, delivery.suspect) == (sent[1], 1, False)
        await living.close()

    through_a_proxy(url, server.port, scenario)


@pytest.mark.parametrize("leaving", ["idle", "consumer", "broker"])
def test_an_ordered_turn_is_passed_on_in_order(url: str, leaving: str) -> None:
    """C14: what the next one gets begins with what the one before held, not with what came after it."""
    sent = [Message(id=new_id(), topic="o", name="work", body=b"{}", key="k") for _ in range(WINDOW + 50)]

    async def main() -> None:
        leaver, stayer = AMQPBroker(url), AMQPBroker(url)
        for broker in (leaver, stayer):
            await broker.connect()
            await broker.declare([Topic(name="o", queue=True)], [Subscription(name="o", pattern="o", ordered=True)])
        await stayer.publish(sent)
        holder, heir = await leaver.consume("o"), await stayer.consume("o")
        (delivery,) = await holder.receive(1, 10.0)
        receiving = asyncio.create_task(heir.receive(1, 30.0))
        assert isinstance(heir, AMQPConsumer)
        async with asyncio.timeout(10.0):
            while heir._source is None or not heir._source.is_quiet:  # noqa: ASYNC110 -- nobody tells of it
                await asyncio.sleep(0.01)
        assert await holder.settle([(delivery, Ack())]) == [None]
        if leaving == "consumer":
            await holder.close()
        elif leaving == "broker":
            # As if the goodbye of the consumer had failed: all that is left is that of the connection.
            await asyncio.gather(*(link.close() for link in leaver._links))
        for expected in sent[1:4]:
            (delivery,) = await receiving
            assert sent.index(delivery.message) == sent.index(expected)
            assert await heir.settle([(delivery, Ack())]) == [None]
            receiving = asyncio.create_task(heir.receive(1, 10.0))
        await receiving
        await stayer.close()
        await leaver.close()

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["idle", "lost"])
def test_a_late_write_does_not_wipe_out_what_is_remembered(url: str, ending: str) -> None:
    """C7: a turn that ends while the state waits to be written leaves every failure for the next one to know."""

    async def main() -> None:
        leaver, stayer = AMQPBroker(url), AMQPBroker(url)
        for broker in (leaver, stayer):
            await broker.connect()
            await broker.declare([Topic(name="o", queue=True)], [Subscription(name="o", pattern="o", ordered=True)])
        await stayer.publish([Message(id=new_id(), topic="o", name="work", body=b"{}", key="k")])
        holder = await leaver.consume("o")
        assert isinstance(holder, OrderedConsumer)
        (delivery,) = await holder.receive(1, 10.0)
        assert await holder.settle([(delivery, Retry(delay=0.0, failure=FAILURE))]) == [None]
        (delivery,) = await holder.receive(1, 10.0)
        async with holder._saving:  # The server takes its time with an earlier write.
            settling = asyncio.create_task(holder.settle([(delivery, Retry(delay=0.0, failure=FAILURE))]))
            if ending == "lost":
                await asyncio.sleep(0)
                assert holder._source is not None
                await holder._source.close()
            else:
                await asyncio.sleep(0.5)
        if ending == "lost":
            with pytest.raises(BrokerUnavailable):
                await settling
        else:
            assert await settling == [None]
        (delivery,) = await (await stayer.consume("o")).receive(1, 10.0)
        assert (delivery.attempt, delivery.suspect) == (3, ending == "lost")
        await stayer.close()
        await leaver.close()

    asyncio.run(main())


def test_a_server_that_is_down_costs_nothing(server: RabbitMQServer, url: str) -> None:
    """I32: no busy loop while it is away; the consumers of before go on when it is back."""

    async def scenario(broker: AMQPBroker, proxy: Proxy) -> None:
        consumer = await broker.consume("q")
        receiving = asyncio.create_task(consumer.receive(1, None))
        await asyncio.sleep(0.2)
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(BrokerUnavailable):
            await receiving
        await refused_without_a_busy_loop(consumer)
        proxy.refusing = False
        await broker.publish([message()])
        assert len(await consumer.receive(1, 5.0)) == 1

    through_a_proxy(url, server.port, scenario)


def test_a_server_short_of_memory_takes_nothing_but_lets_work_go_on(server: RabbitMQServer, url: str) -> None:
    """F10: publishing is refused in a bounded time, acks go their own way; then all goes on by itself."""

    async def main() -> None:
        broker = await ready(AMQPBroker(url))
        await broker.publish([message(), message()])
        consumer = await broker.consume("q")
        (first,) = await consumer.receive(1, 5.0)
        await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.000001")
        try:
            # The first one that is published is what the server tells about it.
            publishing = asyncio.create_task(broker.publish([message()]))
            await asyncio.sleep(1.0)
            with pytest.raises(BrokerUnavailable, match="memory"):
                await broker.publish([message()])
            assert await consumer.settle([(first, Ack())]) == [None]
            assert len(await consumer.receive(1, 5.0)) == 1
        finally:
            await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.4")
        (answer,) = await publishing
        assert isinstance(answer, str)
        await broker.publish([message()])
        await broker.close()

    asyncio.run(main())


# What the server does by itself


def test_a_limit_set_by_policy_is_told(server: RabbitMQServer, url: str) -> None:
    """C15: an operator's limit of a queue refuses what does not fit."""
    namespace = url.partition("namespace=")[2].partition("&")[0]

    async def main() -> None:
        broker = await ready(AMQPBroker(url))
        await asyncio.to_thread(
            server.control, "set_policy", namespace, rf"^{namespace}\.q$", '{"max-length": 5}', "--apply-to", "queues"
        )
        await asyncio.sleep(0.5)
        answers = []
        for _ in range(10):
            answers += await broker.publish([message()])
        # The server counts what is on its way only roughly (rabbitmq.com/docs/maxlength).
        assert 5 <= sum(isinstance(answer, str) for answer in answers) <= 7, answers
        assert isinstance(answers[-1], QueueFull)
        await broker.close()

    asyncio.run(main())


def test_the_server_itself_ends_what_nobody_can_settle(server: RabbitMQServer, url: str) -> None:
    """The backstop: dead-lettered by the server after so many deaths, it is a dead letter like any other."""
    namespace = url.partition("namespace=")[2].partition("&")[0]
    sent = message()

    async def main() -> None:
        broker = await ready(AMQPBroker(url))
        if version_of(broker._reading.server) >= (4, 3):
            await broker.close()
            pytest.skip("since 4.3 the server's own limit counts failures only, and no deaths")
        await broker.publish([sent])
        await asyncio.to_thread(_die_often, server.url, f"{namespace}.q")
        for _ in range(100):
            letters = await broker.dead_letters("q")
            if letters:
                break
            await asyncio.sleep(0.05)
        (letter,) = letters
        assert (letter.message, letter.failures[-1].reason) == (sent, "worker_lost")
        assert abs(letter.dead_at - time.time()) < 30
        assert await broker.redrive("q", [sent.id]) == [sent.id]
        (delivery,) = await (await broker.consume("q")).receive(1, 5.0)
        assert (delivery.message, delivery.attempt) == (sent, 1)
        await broker.close()

    asyncio.run(main())


def _die_often(url: str, queue: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        for _ in range(BACKSTOP + 1):
            method, _, _ = next(channel.consume(queue, inactivity_timeout=5))
            channel.basic_nack(method.delivery_tag, requeue=True)
        channel.cancel()
