"""What only the Redis broker promises: long histories in pages, nothing left behind, signs of life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis import Redis
from services.base import Server

from postroom.broker.base import Ack, Dead, Release, Retry, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.broker.redis.publish import _batches
from postroom.broker.redis.records import escape
from postroom.broker.redis.topology import Known
from postroom.message import Failure, Message, Progress
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def url(server: Server, namespace: str) -> str:
    return f"{server.url}?namespace={namespace}"


def messages(topic: str, count: int, first: int = 0, **options: object) -> list[Message]:
    return [
        Message(id=f"{topic}-{n:05}", topic=topic, name="n", body=b"%d" % n, **options)
        for n in range(first, first + count)
    ]  # type: ignore[arg-type]


QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


def test_a_long_history_of_several_topics_is_replayed_in_order(url: str) -> None:
    """Several pages of one topic beside few messages of another: all, once, as they were published."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare([Topic(name=name, retention=3600) for name in ("t.many", "t.few", "t.some")], [])
        sent: list[str] = []
        for step in range(9):
            # Each in a call of its own, as one call has one time.
            for topic, count in (("t.many", 60), ("t.some", 25), ("t.few", 1)):
                batch = messages(topic, count, step * count)
                sent += [item.id for item in batch]
                await broker.publish(batch)
                await asyncio.sleep(0.002)
        await broker.declare([], [Subscription(name="late", pattern="t.*", start="earliest")])
        consumer = await broker.consume("late")
        for _ in range(2):
            got: list[str] = []
            while deliveries := await consumer.receive(500, 0.0):
                got += [delivery.message.id for delivery in deliveries]
                await consumer.settle([(delivery, Ack()) for delivery in deliveries])
            assert got == sent
            assert await broker.replay("late") == len(sent)
        await broker.close()

    asyncio.run(main())


def test_a_filling_that_was_broken_off_is_made_good(url: str, server: Server, namespace: str) -> None:
    """Who declares a subscription from earliest, and dies before it has the history: the next one completes it."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        late = Subscription(name="late", pattern="t", start="earliest")
        await broker.declare([Topic(name="t", retention=3600)], [])
        await broker.publish(messages("t", 5))
        await broker._topology.declare([], [late])
        assert (await broker.stats())[0].ready == 0
        await broker.declare([], [late])
        assert (await broker.stats())[0].ready == 5
        await broker.declare([], [late])
        assert (await broker.stats())[0].ready == 5
        await broker.close()

    asyncio.run(main())


def test_nothing_is_left_of_what_has_gone(url: str, server: Server, namespace: str) -> None:
    """C15: after the records are forgotten, and after an unsubscribe, there are no keys but the topology's."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(
            [*QUEUE[0], Topic(name="t")], [*QUEUE[1], Subscription(name="s", pattern="t", ordered=True)]
        )
        await broker.publish(messages("q", 20, result_ttl=0.0, expires_at=time.time() + 60))
        consumer = await broker.consume("q")
        deliveries = await consumer.receive(20, 1.0)
        consumer.started(deliveries)
        await consumer.settle([(delivery, Ack()) for delivery in deliveries])
        with Redis.from_url(server.url, decode_responses=True) as client:
            found = set(client.scan_iter(f"{{{namespace}}}:sub:q:*"))
            # A token that rang for nobody may be left: there is never more than one.
            assert found - {f"{{{namespace}}}:sub:q:bell"} == {
                f"{{{namespace}}}:sub:q:{kind}" for kind in ("info", "holders")
            }
            await consumer.close()
            await broker.publish(messages("t", 10, key="k"))
            await broker.unsubscribe("s")
            await broker.unsubscribe("q")
            await broker.close()
            left = {
                key.removeprefix(f"{{{namespace}}}:").partition(":")[0]
                for key in client.scan_iter(f"{{{namespace}}}:*")
            }
        assert left == {"topology", "numbers", "pulse", "inlet"}

    asyncio.run(main())


def test_who_has_died_is_told_from_who_is_frozen(url: str) -> None:
    """C3, C4: no signs of life and no connection is death, long before the lease ends; what only pauses keeps it."""

    async def main() -> None:
        brokers = dead, frozen, alive, other = [RedisBroker(url) for _ in range(4)]
        for broker in brokers:
            await broker.connect()
            await broker.declare(*QUEUE)
        await broker.publish(messages("q", 3))
        consumers = [await broker.consume("q") for broker in (dead, frozen, alive)]
        held = [(await consumer.receive(1, 1.0))[0] for consumer in consumers]
        for consumer, delivery in zip(consumers, held, strict=True):
            consumer.started([delivery])
        for broker in (dead, frozen):
            assert broker._beating is not None
            broker._beating.cancel()
        dead._lifeline.close()
        begin = time.monotonic()
        last = await other.consume("q")
        (again,) = await last.receive(5, 10.0)
        assert time.monotonic() - begin < RedisBroker.capabilities.death_notice
        assert (again.message.id, again.attempt, again.suspect) == (held[0].message.id, 2, True)
        assert "LeaseLost" in repr(await consumers[0].settle([(held[0], Release())]))
        assert await last.receive(5, 3.0) == []
        for consumer, delivery in zip(consumers[1:], held[1:], strict=True):
            assert await consumer.settle([(delivery, Ack())]) == [None]
        for broker in brokers:
            await broker.close()

    asyncio.run(main())


def test_a_lifeline_that_the_server_does_not_know_is_made_anew(url: str, server: Server, namespace: str) -> None:
    """As after a failover to another server, when this one still answers: notes would go where nobody reads them."""

    async def main() -> None:
        broker, other = RedisBroker(url), RedisBroker(url)
        for each in (broker, other):
            await each.connect()
            await each.declare(*QUEUE)
        await broker.publish(messages("q", 1))
        consumer = await broker.consume("q", lease=2.0)
        # It goes on, but to another channel.
        connection = broker._lifeline._connection
        connection.send_command("UNSUBSCRIBE")
        begin = time.monotonic()
        while broker._lifeline._connection in (connection, None):
            assert time.monotonic() - begin < 10
            await asyncio.sleep(0.05)
        (delivery,) = await consumer.receive(1, 1.0)
        consumer.started([delivery])
        (again,) = await (await other.consume("q")).receive(1, 10.0)
        assert (again.attempt, again.suspect) == (2, True)
        for each in (broker, other):
            await each.close()

    asyncio.run(main())


def test_settles_that_come_together_go_together(url: str, server: Server) -> None:
    """In a call or two; and closed while they wait for each other, none of them is forgotten."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        await broker.publish(messages("q", 51))
        consumer = await broker.consume("q")
        first, *others = await consumer.receive(51, 1.0)
        with Redis.from_url(server.url) as client:
            before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            settling = [asyncio.create_task(consumer.settle([(first, Ack())]))]
            # It is on its way when the others come.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            settling += [asyncio.create_task(consumer.settle([(delivery, Ack())])) for delivery in others]
            await asyncio.sleep(0)
            await broker.close()
            assert [await task for task in settling] == [[None]] * 51
            # The two, the last of the consumer that closes, and perhaps a sign of life or two.
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] <= before + 5
        broker = RedisBroker(url)
        await broker.connect()
        assert {record.state.value for record in await broker.jobs.search()} == {"succeeded"}
        await broker.close()

    asyncio.run(main())


def test_one_token_wakes_one_of_many(url: str) -> None:
    """What is published to many that wait goes to as many as there is for, at once, and the others wait on."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        waiting = [asyncio.create_task((await broker.consume("q")).receive(1, 5.0)) for _ in range(6)]
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        await broker.publish(messages("q", 4))
        got: list[str] = []
        for task in asyncio.as_completed(waiting):
            deliveries = await task
            got += [delivery.message.id for delivery in deliveries]
            if len(got) == 4:
                break
        # Unless whoever finds more rings again, they look after a second only.
        assert time.monotonic() - begin < 0.6
        assert len(set(got)) == 4
        await asyncio.gather(*waiting)
        await broker.close()

    asyncio.run(main())


def test_a_token_that_nobody_waits_for_is_passed_on(url: str) -> None:
    """A consumer that waited once, and is busy now, does not keep it from one that waits."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        busy, idle = await broker.consume("q"), await broker.consume("q")
        assert await busy.receive(1, 0.05) == []
        waiting = asyncio.create_task(idle.receive(1, 5.0))
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        await broker.publish(messages("q", 1))
        assert len(await waiting) == 1
        assert time.monotonic() - begin < 0.6
        await broker.close()

    asyncio.run(main())


def test_what_the_server_has_deleted_holds_up_nobody(url: str, server: Server, namespace: str) -> None:
    """A server that makes room by itself: a message is gone, and the others go on, whatever it was doing."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(
            [*QUEUE[0], Topic(name="o", queue=True)], [*QUEUE[1], Subscription(name="o", pattern="o", ordered=True)]
        )
        await broker.publish(messages("q", 8))
        await broker.publish(messages("o", 4, key="k"))
        consumer, ordered = await broker.consume("q", lease=0.5), await broker.consume("o", lease=0.5)
        acked, failed, dead, buried, lost = await consumer.receive(5, 1.0)
        await consumer.settle([(buried, Dead(Failure(attempt=1, reason="error")))])
        (head,) = await ordered.receive(5, 1.0)
        ordered.started([head])
        with Redis.from_url(server.url) as client:
            gone = [*(item.message.id for item in (acked, failed, dead, buried, lost)), "q-00006"]
            client.delete(*(f"{{{namespace}}}:sub:q:message:{message_id}" for message_id in gone))
            client.delete(*(f"{{{namespace}}}:sub:o:message:o-0000{n}" for n in (0, 1, 3)))
        failure = Failure(attempt=1, reason="error")
        outcomes = [(acked, Ack()), (failed, Retry(delay=0.0, failure=failure)), (dead, Dead(failure))]
        assert await consumer.settle(outcomes) == [None] * 3
        await asyncio.sleep(0.6)
        assert [item.message.id for item in await ordered.receive(5, 1.0)] == ["o-00002"]
        got = await consumer.receive(5, 1.0)
        assert [item.message.id for item in got] == ["q-00005", "q-00007"]
        await consumer.settle([(item, Ack()) for item in got])
        assert {(stats.name, stats.ready, stats.delayed, stats.running) for stats in await broker.stats()} == {
            ("o", 0, 1, 1), ("q", 0, 0, 0),
        }  # fmt: skip
        assert len(await broker.jobs.search()) == 5
        assert [letter.message.body for letter in await broker.dead_letters("q")] == [b"", b""]
        assert await broker.redrive("q", [buried.message.id]) == []
        assert await broker.discard("q", [dead.message.id]) == [dead.message.id]
        assert await broker.dead_letters("q") == []
        await broker.close()

    asyncio.run(main())


def test_many_that_the_server_has_deleted_are_found_at_once(url: str, server: Server, namespace: str) -> None:
    """Not by reading all keys for each of them: that would take the server seconds."""

    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="o", queue=True)], [Subscription(name="o", pattern="o", ordered=True)])
        await broker.publish([item for n in range(200) for item in messages("o", 2, 2 * n, key=f"k{n}")])
        consumer = await broker.consume("o")
        with Redis.from_url(server.url) as client:
            client.delete(*(f"{{{namespace}}}:sub:o:message:o-{2 * n:05}" for n in range(200)))
            client.config_resetstat()
            assert await consumer.receive(200, 0.0) == []
            read = client.info("commandstats")["cmdstat_hgetall"]["calls"]
        # Of each message, of the keys, and of the topology now and then.
        assert read <= 220
        assert len(await consumer.receive(200, 1.0)) == 200
        await broker.close()

    asyncio.run(main())


def test_progress_of_a_message_that_was_deleted_leaves_nothing(url: str, server: Server, namespace: str) -> None:
    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        await broker.publish(messages("q", 1))
        (delivery,) = await (await broker.consume("q")).receive(1, 1.0)
        with Redis.from_url(server.url) as client:
            client.delete(f"{{{namespace}}}:sub:q:message:q-00000")
        await broker.jobs.report([(delivery, Progress(0.5))])
        assert await broker.jobs.get("q-00000") == []
        await broker.close()

    asyncio.run(main())


def test_thousands_of_queues_are_declared_at_once(url: str) -> None:
    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        names = [f"q{n}" for n in range(4000)]
        await broker.declare(
            [Topic(name=name, queue=True) for name in names], [Subscription(name=name, pattern=name) for name in names]
        )
        assert await broker.publish([Message(id="1", topic=names[-1], name="n", body=b"")]) == ["1"]
        await broker.close()

    asyncio.run(main())


def test_a_retention_beyond_all_times_keeps_all(url: str) -> None:
    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="t", retention=1e12)], [Subscription(name="s", pattern="t")])
        assert await broker.publish(messages("t", 1)) == ["t-00000"]
        assert (await broker.stats())[0].ready == 1
        assert await broker.replay("s") == 0
        await broker.close()

    asyncio.run(main())


def test_a_wide_fan_out_is_cut_into_small_scripts() -> None:
    subscriptions = {f"s{n}": Subscription(name=f"s{n}", pattern="t") for n in range(50)}
    known = Known("1", {"t": Topic(name="t")}, subscriptions, frozenset(), {})
    assert [len(batch) for batch in _batches(known, messages("t", 45))] == [20, 20, 5]
    assert [len(batch) for batch in _batches(known, messages("unknown", 300))] == [250, 50]
    large = [Message(id=name, topic="t", name="n", body=b"x" * 200_000) for name in "abc"]
    assert [len(batch) for batch in _batches(known, large)] == [1, 1, 1]


def test_names_are_escaped() -> None:
    assert escape("a:b%c") == "a%3Ab%25c"
