"""Two processes at once, and topics that are not what they were: what was confirmed reaches whom it was promised."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from services.base import Server

from postroom.broker.base import Ack, Dead, Release, Subscription, Topic
from postroom.broker.kafka import KafkaBroker
from postroom.errors import BrokerUnavailable, ConfigurationError, SubscriptionNotFound, TopicNotFound
from postroom.message import Failure, Message, new_id
from tests.kafka import opened, url_of
from tests.servers import private

pytestmark = pytest.mark.server

FAILURE = Failure(attempt=1, reason="error")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


@pytest.fixture
def url(server: Server) -> str:
    return url_of(server)


def queue(name: str) -> tuple[list[Topic], list[Subscription]]:
    return [Topic(name=name, queue=True)], [Subscription(name=name, pattern=name)]


async def publish(broker: KafkaBroker, topic: str, count: int = 3) -> list[str]:
    sent = [Message(id=new_id(), topic=topic, name="work", body=b"{}") for _ in range(count)]
    told = await broker.publish(sent)
    assert told == [message.id for message in sent]
    return [message.id for message in sent]


async def received(broker: KafkaBroker, subscription: str) -> list[str]:
    """All there is, and done."""
    consumer = await broker.consume(subscription)
    await consumer.hub.joined()
    found: list[str] = []
    while taken := await consumer.receive(100, 1.0):
        await consumer.settle([(delivery, Ack()) for delivery in taken])
        found += [delivery.message.id for delivery in taken]
    await consumer.close()
    return found


def first(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], Awaitable[None]]) -> None:
    """Have something happen just before the next call."""
    method = getattr(owner, name)

    async def called(*arguments: Any) -> Any:
        monkeypatch.setattr(owner, name, method)
        await act()
        return await method(*arguments)

    monkeypatch.setattr(owner, name, called)


def test_who_declares_late_takes_nothing_from_who_declared_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: processes of one app start together. The slow one must not say that the subscription begins only now."""

    async def scenario() -> None:
        async with opened(url) as quick, opened(url) as slow:
            await quick.declare([Topic(name="t")], [])
            asked = Subscription(name="s", pattern="t")
            sent: list[str] = []

            async def overtake() -> None:
                await quick.declare([], [asked])
                sent.extend(await publish(quick, "t"))

            assert slow._topology is not None
            first(monkeypatch, slow._topology, "_entry", overtake)
            await slow.declare([], [asked])
            async with opened(url) as late:  # Which knows only what was written last, if that is all that was kept.
                assert late._topology is not None
                assert late._topology.subscriptions["s"] == slow._topology.subscriptions["s"]
            assert await received(slow, "s") == sent

    asyncio.run(scenario())


def test_a_purge_does_not_undo_what_is_declared_meanwhile(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])
            await publish(broker, "t")
            changed = Subscription(name="s", pattern="t", where={"region": "eu"})
            assert broker._topology is not None
            first(monkeypatch, broker._topology, "purge", lambda: other.declare([], [changed]))
            assert await broker.purge("s") == 3
            assert broker._topology.subscriptions["s"].asked == changed
            assert await received(broker, "s") == []

    asyncio.run(scenario())


def test_a_trim_spares_who_has_just_subscribed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I26: it knows the ends of the topics before it knows whom they are for."""

    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await broker.declare([Topic(name="t")], [])
            await publish(broker, "t")
            sent: list[str] = []

            async def subscribe() -> None:
                await other.declare([], [Subscription(name="late", pattern="t")])
                sent.extend(await publish(other, "t"))

            assert broker._topology is not None
            first(monkeypatch, broker._topology, "ends", subscribe)
            await broker.trim()
            assert await received(other, "late") == sent

    asyncio.run(scenario())


def test_what_was_purged_is_not_what_comes_in_a_topic_made_anew(url: str) -> None:
    """C2: somebody deletes the Kafka topic, and it is declared again. Its offsets begin at 0 once more."""

    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare(*queue("q"))
            await publish(broker, "q", 5)
            assert await broker.purge("q") == 5
            name = broker.options.names.topic("q")
            admin = AdminClient(broker.options.client)
            (deleted,) = admin.delete_topics([name]).values()
            await asyncio.wrap_future(deleted)
            assert broker._topology is not None
            while name in broker._topology.partitions:
                await broker._topology._look_for([])
            await broker.declare(*queue("q"))
            sent = await publish(broker, "q")
            assert await received(broker, "q") == sent

    asyncio.run(scenario())


def test_a_queue_that_is_deleted_is_gone(url: str) -> None:
    """Nothing is accepted that nobody will ever get, and what is declared next does not miss it."""

    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await broker.declare(*queue("q"))
            await publish(broker, "q")
            await broker.unsubscribe("q")
            message = Message(id=new_id(), topic="q", name="work", body=b"{}")
            (answer,) = await broker.publish([message])
            assert isinstance(answer, TopicNotFound)
            await other.declare(*queue("another"))
            await other.declare(*queue("q"))
            assert await received(broker, "q") == []
            sent = await publish(broker, "q")
            assert await received(other, "q") == sent

    asyncio.run(scenario())


def test_a_topic_declared_elsewhere_is_known_to_all_who_publish_at_once(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await other.declare([Topic(name="t")], [])
            await asyncio.gather(*(publish(broker, "t", 1) for _ in range(5)))

    asyncio.run(scenario())


def test_a_topic_that_could_not_be_looked_for_is_looked_for_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: the server goes away between the word of a topic and the look at it."""

    async def scenario() -> None:
        async with opened(url) as declaring, opened(url) as publishing:
            await declaring.declare(*queue("q"))
            first(monkeypatch, publishing._opened(), "_look_for", no_answer)
            with pytest.raises(BrokerUnavailable):
                await publish(publishing, "q")
            assert len(await publish(publishing, "q")) == 3

    asyncio.run(scenario())


def test_a_replay_does_not_mind_what_is_declared_meanwhile(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare([Topic(name="a.1", retention=60.0)], [Subscription(name="s", pattern="a.*")])
            sent = await publish(broker, "a.1")
            assert await received(broker, "s") == sent

            async def declare() -> None:
                await broker.declare([Topic(name="a.2", retention=60.0)], [])

            first(monkeypatch, broker._opened(), "retained", declare)
            assert await broker.replay("s") == len(sent)

    asyncio.run(scenario())


def test_an_unsubscribe_that_fails_half_way_can_be_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing comes back with the name."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await publish(broker, "q", 2)
            consumer = await broker.consume("q")
            taken = [*await consumer.receive(1, 10.0), *await consumer.receive(1, 10.0)]
            await consumer.settle([(taken[0], Dead(FAILURE)), (taken[1], Release(60.0))])
            for owner, step in ((broker._opened(), "empty"), (broker._groups, "delete"), (broker._opened(), "remove")):
                first(monkeypatch, owner, step, no_answer)
                with pytest.raises(BrokerUnavailable):
                    await broker.unsubscribe("q")
            await broker.unsubscribe("q")
            await broker.declare(*queue("q"))
            (stats,) = await broker.stats()
            assert (stats.ready, stats.delayed, stats.running, stats.dead) == (0, 0, 0, 0)

    asyncio.run(scenario())


async def no_answer() -> None:
    raise BrokerUnavailable("no answer")


def test_letters_of_a_subscription_made_anew_by_another_process(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await broker.declare(*queue("q"))
            for _ in range(2):
                (buried,) = await publish(broker, "q", 1)
                consumer = await broker.consume("q")
                (delivery,) = await consumer.receive(1, 10.0)
                assert await consumer.settle([(delivery, Dead(FAILURE))]) == [None]
                assert [letter.message.id for letter in await other.dead_letters("q", ids=[buried])] == [buried]
                await broker.unsubscribe("q")
                await broker.declare(*queue("q"))

    asyncio.run(scenario())


def test_letters_that_share_an_id_are_each_their_own(url: str) -> None:
    """C8: other clients may give one id to many messages. Pages neither leave one out nor begin anew."""

    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare(*queue("q"))
            sent = [Message(id=id_, topic="q", name="work", body=b"%d" % n) for n, id_ in enumerate("abacbd")]
            await broker.publish(sent)
            consumer = await broker.consume("q")
            while taken := await consumer.receive(10, 1.0):
                await consumer.settle([(delivery, Dead(FAILURE)) for delivery in taken])
            found: list[str] = []
            after: str | None = None
            while page := await broker.dead_letters("q", after=after, limit=2):
                found += [letter.message.id for letter in page]
                after = page[-1].message.id
                assert len(found) <= len(sent), "begins anew"
            assert sorted(found) == ["a", "a", "b", "b", "c", "d"]
            assert await broker.discard("q", ["a"]) == ["a"]
            assert sorted(await broker.redrive("q", ["b", "c"])) == ["b", "c"]
            bodies = set()
            while taken := await consumer.receive(10, 1.0):
                bodies |= {delivery.message.body for delivery in taken}
            assert bodies == {b"1", b"3", b"4"}
            assert [letter.message.id for letter in await broker.dead_letters("q")] == ["d"]

    asyncio.run(scenario())


def test_a_double_click_redrives_once(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as broker:
            await broker.declare(*queue("q"))
            (buried,) = await publish(broker, "q", 1)
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(1, 10.0)
            await consumer.settle([(delivery, Dead(FAILURE))])
            await consumer.close()
            both = await asyncio.gather(*(broker.redrive("q", [buried]) for _ in range(2)))
            assert sorted(both) == [[], [buried]]
            assert await received(broker, "q") == [buried]

    asyncio.run(scenario())


def test_who_works_on_a_subscription_hears_that_it_was_deleted_though_it_is_there_again(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as broker, opened(url) as other:
            await broker.declare(*queue("q"))
            consumer = await other.consume("q")
            await broker.unsubscribe("q")
            await broker.declare(*queue("q"))

            async def work() -> None:
                while True:
                    await consumer.receive(1, 0.5)

            with pytest.raises(SubscriptionNotFound):
                await work()

    asyncio.run(scenario())


@pytest.mark.parametrize("setting", ["ca=/no/such/file.pem", "certificate=/no/such/file.pem"])
def test_a_setting_the_client_cannot_use_is_told(server: Server, setting: str) -> None:
    broker = KafkaBroker(f"{server.url.replace('kafka:', 'kafka+ssl:')}?{setting}")
    with pytest.raises(ConfigurationError, match=r"(?s)setting of the URL.*ssl\."):
        asyncio.run(broker.connect())
