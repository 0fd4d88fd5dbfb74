"""What is particular to SQS: hops, filters that SNS cannot keep, ordered topics, the end at 12 hours, twins."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import pytest
from services.sqs import CREDENTIALS, SQSServer

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Release, Retry, Subscription, Topic
from postroom.broker.sqs import SQSBroker, letters, topology
from postroom.broker.sqs.held import MOST_HIDDEN
from postroom.broker.sqs.service import Answers
from postroom.broker.sqs.wire import Copy, read
from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    LeaseLost,
    MessageTooLarge,
    UnsupportedOperation,
)
from postroom.message import Failure, Message, new_id
from tests.servers import private

Play = Callable[[Callable[[SQSBroker, SQSBroker], Awaitable[None]]], None]
FAILURE = Failure(attempt=1, reason="error", error="ValueError")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQSServer]:
    with pytest.MonkeyPatch.context() as patch, private("sqs", tmp_path_factory.mktemp("sqs")) as made:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        assert isinstance(made, SQSServer)
        yield made


@pytest.fixture
def play(server: SQSServer) -> Play:
    """Runs a scenario with two connected brokers on fresh queues."""

    async def run(scenario: Callable[[SQSBroker, SQSBroker], Awaitable[None]]) -> None:
        url = f"{server.url}&namespace=t{uuid4().hex[:12]}"
        brokers = SQSBroker(url), SQSBroker(url)
        for broker in brokers:
            await broker.connect()
        try:
            async with asyncio.timeout(60):
                await scenario(*brokers)
        finally:
            for broker in brokers:
                await broker.close()

    return lambda scenario: asyncio.run(run(scenario))


def message(topic: str, body: str = "m", **fields: Any) -> Message:
    return Message(**({"id": new_id(), "topic": topic, "name": "work", "body": body.encode()} | fields))


async def queue(broker: SQSBroker, name: str, **options: Any) -> None:
    await broker.declare([Topic(name=name, queue=True)], [Subscription(name=name, pattern=name, **options)])


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    while len(taken) < count:
        taken += await consumer.receive(count - len(taken), 5.0)
    return taken


def bodies(deliveries: list[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


async def counts(broker: SQSBroker) -> dict[str, int]:
    (stats,) = await broker.stats()
    return {name: count for name in ("ready", "delayed", "running", "dead") if (count := getattr(stats, name))}


def test_what_comes_too_early_is_passed_on(play: Play) -> None:
    """SNS delays nothing: whoever finds the event first hides it until its time, and that is no attempt."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])
        due = time.time() + 2.5
        await broker.publish([message("t", not_before=due)])
        consumer = await broker.consume("s")
        assert await consumer.receive(1, 0.5) == []
        assert await counts(broker) == {"delayed": 1}
        (delivery,) = await take(await other.consume("s"), 1)
        assert time.time() >= due
        assert (delivery.attempt, delivery.suspect) == (1, False)

    play(scenario)


def test_a_long_delay_goes_in_hops(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", not_before=time.time() + 5000)])
        assert await counts(broker) == {"delayed": 1}
        consumer = await broker.consume("q")
        await broker.publish([message("q", "failed")])
        (delivery,) = await take(consumer, 1)
        assert await consumer.settle([(delivery, Retry(delay=100_000.0, failure=FAILURE))]) == [None]
        assert await counts(broker) == {"delayed": 2}

    play(scenario)


def test_a_filter_that_sns_cannot_keep(play: Play) -> None:
    """Of messages with many headers the consumer drops those it does not want, and nobody hears of them."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare(
            [Topic(name="t")],
            [Subscription(name="s", pattern="t", where={"region": "eu", "a header": "x"})],
        )
        many = {str(number): "x" for number in range(8)}
        wanted = {"region": "eu", "a header": "x"}
        await broker.publish(
            [
                message("t", "wanted", headers=wanted | many),
                message("t", "other region", headers={"region": "us", "a header": "x"} | many),
                message("t", "few", headers=wanted),
                message("t", "shown", headers={"region": "eu"}),
            ]
        )
        consumer = await broker.consume("s")
        assert sorted(bodies(await take(consumer, 2))) == ["few", "wanted"]
        assert await consumer.receive(10, 0.5) == []
        assert await counts(broker) == {"running": 2}

    play(scenario)


def test_an_ordered_subscription_of_a_topic(play: Play) -> None:
    """Publishers send to it themselves, also those that knew the topic before; beside it SNS serves the others."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="plain", pattern="t")])
        await other.publish([message("t", "before", key="k")])
        declared = Subscription(name="ordered", pattern="t", ordered=True, where={"region": "eu"})
        await broker.declare([], [declared])
        eu = {"region": "eu"}
        await other.publish([message("t", str(number), key="k", headers=eu) for number in range(12)])
        await other.publish([message("t", "us", key="k", headers={"region": "us"})])
        consumer, seen = await broker.consume("ordered"), []
        for _ in range(12):
            (delivery,) = await take(consumer, 1)
            seen += bodies([delivery])
            await consumer.settle([(delivery, Ack())])
        assert seen == [str(number) for number in range(12)]
        assert await consumer.receive(1, 0.5) == []
        assert len(await take(await broker.consume("plain"), 14)) == 14

    play(scenario)


def test_attempts_in_an_ordered_queue(play: Play) -> None:
    """In one process a release does not count; the service counts it for another, and errors are not handed on."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=True)
        await broker.publish([message("q", key="k", not_before=time.time() + 3.0)])
        consumer = await broker.consume("q")
        assert await consumer.receive(1, 0.5) == []
        for outcome, attempt in ((Release(), 1), (Retry(delay=0.0, failure=FAILURE), 1), (Release(), 2)):
            (delivery,) = await take(consumer, 1)
            assert (delivery.attempt, delivery.suspect) == (attempt, False)
            assert await consumer.settle([(delivery, outcome)]) == [None]
        (delivery,) = await take(await other.consume("q"), 1)
        assert (delivery.attempt, delivery.suspect) == (4, True)

    play(scenario)


def test_a_lease_ends_at_12_hours(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", "old"), message("q", "new")])
        consumer = await broker.consume("q", lease=30.0)
        old, new = sorted(await take(consumer, 2), key=lambda delivery: delivery.message.body, reverse=True)
        old.receipt.taken -= MOST_HIDDEN - 10
        assert await consumer.extend([old, new]) == []
        assert old.receipt.until < time.monotonic() + 11 < new.receipt.until
        old.receipt.taken -= 20
        assert await consumer.extend([old, new]) == [old]
        old.receipt.until = 0.0
        (answer,) = await consumer.settle([(old, Ack())])
        assert isinstance(answer, LeaseLost)
        with pytest.raises(ConfigurationError, match="12 h"):
            await broker.consume("q", lease=MOST_HIDDEN + 1)

    play(scenario)


def test_the_service_gives_one_message_twice(play: Play) -> None:
    """At least once, it says: while we have it, it is one delivery, settled with the later receipt."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q")])
        consumer = await broker.consume("q")
        (delivery,) = await take(consumer, 1)
        service, topology = broker._opened()
        await service.hide((await topology.find("q")).url, [(delivery.receipt.receipt, 0)])
        first = delivery.receipt.receipt
        assert await consumer.receive(1, 0.5) == []
        assert delivery.receipt.receipt != first
        assert await consumer.settle([(delivery, Ack())]) == [None]
        assert await counts(broker) == {}

    play(scenario)


def test_an_event_is_as_large_as_its_topic_takes(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])
        answers = await broker.publish([message("t", "x" * 250_000), message("t", "x" * 700_000), message("t")])
        assert [isinstance(answer, str) for answer in answers] == [True, False, True]
        assert isinstance(answers[1], MessageTooLarge)

    play(scenario)


def test_a_deleted_queue_is_told(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q")])
        await other.unsubscribe("q")
        (answer,) = await broker.publish([message("q")])
        assert type(answer).__name__ == "TopicNotFound"
        await queue(other, "q")
        lost = message("q", "again")
        assert await broker.publish([lost]) == [lost.id]

    play(scenario)


def test_two_people_read_the_dead_letters_at_once(play: Play) -> None:
    """One has them in hand, hidden from the other, who waits for a moment: both see all."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        sent = [message("q", str(number)) for number in range(25)]
        await broker.publish(sent)
        consumer = await broker.consume("q")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await take(consumer, 25)])
        ids = {one.id for one in sent}
        for found in await asyncio.gather(broker.dead_letters("q"), other.dead_letters("q")):
            assert {letter.message.id for letter in found} == ids
        assert await counts(broker) == {"dead": 25}

    play(scenario)


def test_an_idle_consumer_lets_the_service_wait(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that receives for a second at a time costs a request every ``wait`` seconds, and no more."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        service, _ = broker._opened()
        waits: list[int] = []
        call = service.call

        async def noted(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            if operation == "receive_message":
                waits.append(parameters["WaitTimeSeconds"])
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", noted)
        consumer = await broker.consume("q")
        for _ in range(3):
            assert await consumer.receive(10, 1.0) == []
        assert set(waits) == {1}
        assert len(waits) <= 4

    play(scenario)


def test_what_is_denied_later_is_tried_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """C17: a policy that is wrong for an hour must not end all workers for good."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        service, _ = broker._opened()
        call, denied = service.call, True

        async def deny(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            if denied and operation == "receive_message":
                raise ConfigurationError("AccessDenied")
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", deny)
        consumer = await broker.consume("q")
        with pytest.raises(ConfigurationError, match="AccessDenied"):
            await consumer.receive(1, 1.0)
        denied = False
        assert await consumer.receive(1, 1.0) == []
        denied = True
        with pytest.raises(BrokerUnavailable, match="AccessDenied"):
            await consumer.receive(1, 1.0)
        denied = False
        await broker.publish([message("q")])
        assert len(await take(consumer, 1)) == 1

    play(scenario)


@pytest.mark.parametrize("operation", ["delete_message_batch", "send_message_batch", "change_message_visibility_batch"])
def test_what_a_running_worker_is_denied_costs_no_lease(
    play: Play, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """What is done stays done, and is told as soon as that is allowed again; what runs goes on."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", str(number)) for number in range(3)])
        consumer = await broker.consume("q")
        first, second, third = await take(consumer, 3)
        retry = Retry(delay=60.0, failure=FAILURE)
        assert await consumer.extend([first, second, third]) == []
        assert await consumer.settle([(first, retry)]) == [None]
        service, _ = broker._opened()
        call, denied = service.call, True

        async def deny(name: str, asked: str, **parameters: Any) -> dict[str, Any]:
            if denied and asked == operation:
                raise ConfigurationError("AccessDenied")
            return await call(name, asked, **parameters)

        monkeypatch.setattr(service, "call", deny)
        is_renewal = operation == "change_message_visibility_batch"
        asking = consumer.extend([third]) if is_renewal else consumer.settle([(second, Ack()), (third, retry)])
        with pytest.raises(BrokerUnavailable, match="AccessDenied"):
            await asking
        denied = False
        assert await consumer.extend([third]) == []
        assert await consumer.settle([(second, Ack()), (third, retry)]) == [None, None]
        assert await counts(broker) == {"delayed": 2}

    play(scenario)


def test_a_redrive_before_does_not_change_the_order(play: Play) -> None:
    """Whatever a process has sent to an ordered queue before, what it sends at once leaves one batch after another."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=True)
        await broker.publish([message("q", "dead", key="dead")])
        consumer = await broker.consume("q")
        (delivery,) = await take(consumer, 1)
        await consumer.settle([(delivery, Dead(FAILURE))])
        await other.redrive("q", [delivery.message.id])
        sent = [str(number) for number in range(60)]
        await asyncio.gather(*(other.publish([message("q", body, key="k")]) for body in sent))
        seen: list[str] = []
        while len(seen) < len(sent):
            (delivery,) = await take(consumer, 1)
            await consumer.settle([(delivery, Ack())])
            seen += [] if delivery.message.key == "dead" else bodies([delivery])
        assert seen == sent

    play(scenario)


def test_suspects_that_wait_in_an_ordered_queue_lose_no_attempt(play: Play) -> None:
    """C7: they wait where they are, as whoever got them next would count what is given back as one more death."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=True)
        await broker.publish([message("q", key=str(number)) for number in range(8)])
        await take(await broker.consume("q", lease=2.0), 8)  # Its holder dies: nobody renews.
        attempts: list[int] = []

        async def work(worker: SQSBroker) -> None:
            consumer = await worker.consume("q", lease=2.0)
            while len(attempts) < 8:
                for delivery in await consumer.receive(10, 1.0):
                    # Longer than a suspect was kept, with the lease alive.
                    for _ in range(3):
                        await asyncio.sleep(0.5)
                        assert await consumer.extend([delivery]) == []
                    assert await consumer.settle([(delivery, Ack())]) == [None]
                    attempts.append(delivery.attempt)

        await asyncio.gather(work(other), work(broker))
        assert attempts == [2] * 8

    play(scenario)


def test_a_suspect_that_waits_outlives_a_short_outage(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: that its lease could not be renewed once costs it no attempt."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=True)
        await broker.publish([message("q", key=str(number)) for number in range(2)])
        await take(await other.consume("q", lease=1.0), 2)  # Its holder dies: nobody renews.
        consumer = await broker.consume("q", lease=4.0)
        (first,) = await take(consumer, 1)
        async with asyncio.timeout(10):
            while not consumer._suspects:
                assert await consumer.receive(1, 1.0) == []
        service, _ = broker._opened()
        hide, failures = service.hide, 0

        async def fail_once(url: str, receipts: list[tuple[str, int]]) -> Answers:
            nonlocal failures
            if receipts != [(first.receipt.receipt, 4)] and not failures:
                failures += 1
                return [BrokerUnavailable("throttled")]
            return await hide(url, receipts)

        monkeypatch.setattr(service, "hide", fail_once)
        async with asyncio.timeout(10):
            while not failures:
                assert await consumer.extend([first]) == []
                assert await consumer.receive(1, 0.5) == []
        assert await consumer.settle([(first, Ack())]) == [None]
        (second,) = await take(consumer, 1)
        assert second.attempt == 2

    play(scenario)


def test_the_clients_own_error_is_the_cause(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        consumer = await broker.consume("q")
        assert await consumer.receive(1, 1.0) == []
        service, _ = broker._opened()

        async def fail(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            raise BrokerUnavailable("gone") from OSError("cable")

        monkeypatch.setattr(service, "call", fail)
        with pytest.raises(BrokerUnavailable, match="gone") as told:
            await consumer.receive(1, 3.0)
        assert isinstance(told.value.__cause__, OSError)

    play(scenario)


def test_all_dead_letters_of_one_key_are_seen(play: Play) -> None:
    """C8: of one message group the service shows no more than ten at once, so dead letters have groups of their own."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=True)
        sent = [message("q", str(number), key="k") for number in range(13)]
        await broker.publish(sent)
        consumer = await broker.consume("q")
        for _ in sent:
            (delivery,) = await take(consumer, 1)
            assert await consumer.settle([(delivery, Dead(FAILURE))]) == [None]
        ids = [one.id for one in sent]
        assert [letter.message.id for letter in await broker.dead_letters("q")] == ids
        assert await broker.redrive("q", ids) == ids
        for one in sent:
            (delivery,) = await take(consumer, 1)
            assert (delivery.message.id, delivery.message.key) == (one.id, "k")
            assert await consumer.settle([(delivery, Ack())]) == [None]

    play(scenario)


def test_reading_ends_though_letters_come_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more letters than can be read before the first of them are visible again, there is an end all the same."""
    monkeypatch.setattr(letters, "_HIDDEN", 0)
    monkeypatch.setattr(letters, "_PATIENCE", 0.0)

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", str(number)) for number in range(12)])
        consumer = await broker.consume("q")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await take(consumer, 12)])
        async with asyncio.timeout(20):
            found = await broker.dead_letters("q")
        assert 10 <= len(found) == len({letter.message.id for letter in found})

    play(scenario)


def test_a_subscription_without_its_dead_letters_gets_them_back(play: Play) -> None:
    """Whoever removed it died half-way; declared again, what dies in it is kept."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        service, topology = other._opened()
        await service.call("sqs", "delete_queue", QueueUrl=(await topology.find("q")).dead_url)
        assert await counts(broker) == {}
        await queue(broker, "q")
        await broker.publish([message("q")])
        consumer = await broker.consume("q")
        assert await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await take(consumer, 1)]) == [None]
        assert await counts(broker) == {"dead": 1}

    play(scenario)


def test_a_queue_whose_tags_were_changed_is_told(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        service, topology = other._opened()
        kept = await topology.find("q")
        await service.call("sqs", "untag_queue", QueueUrl=kept.url, TagKeys=["postroom-pattern"])
        with pytest.raises(ConfigurationError, match=r"-q: its tags .* restore them"):
            await broker.stats()
        await service.call(
            "sqs", "tag_queue", QueueUrl=kept.url, Tags={"postroom-pattern": "q", "postroom-where": "[]"}
        )
        with pytest.raises(ConfigurationError, match=r"-q: its tags"):
            await broker.stats()

    play(scenario)


def test_an_ordered_subscription_that_has_gone_fails_no_publish(play: Play) -> None:
    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="plain", pattern="t")])
        await broker.declare([], [Subscription(name="ordered", pattern="t", ordered=True)])
        first, second = message("t", key="k"), message("t", key="k")
        assert await other.publish([first]) == [first.id]
        await broker.unsubscribe("ordered")
        assert await other.publish([second]) == [second.id]
        assert len(await take(await broker.consume("plain"), 2)) == 2

    play(scenario)


def test_at_amazon_a_new_queue_is_given_its_second(server: SQSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that it may be unknown to those who would use it (CreateQueue); emulators know it at once."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)

    async def scenario() -> None:
        broker = SQSBroker(f"sqs://eu-west-1?namespace=t{uuid4().hex[:12]}")
        await broker.connect()
        try:
            begin = time.monotonic()
            await queue(broker, "q")
            assert time.monotonic() > begin + 2.0, "one for the dead letters, and one"
        finally:
            await broker.close()

    asyncio.run(scenario())


def test_what_comes_late_in_a_long_poll_has_most_of_its_lease(server: SQSServer) -> None:
    """The lease counts from the question, so a poll must not wait at the service until it is over."""

    async def scenario() -> None:
        broker = SQSBroker(f"{server.url}&wait=8&namespace=t{uuid4().hex[:12]}")
        await broker.connect()
        try:
            await queue(broker, "q")
            consumer = await broker.consume("q", lease=6.0)
            receiving = asyncio.ensure_future(consumer.receive(1, 10.0))
            await asyncio.sleep(5.0)
            await broker.publish([message("q")])
            (delivery,) = await receiving
            assert (delivery.attempt, delivery.suspect) == (1, False)
            assert delivery.receipt.until > time.monotonic() + 3.0
        finally:
            await broker.close()

    asyncio.run(scenario())


def test_a_close_that_was_broken_off_is_done_by_the_next(play: Play) -> None:
    """Somebody's patience ended: the broker that is closed next still gives back what the consumer held."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q")])
        consumer = await broker.consume("q")
        await take(consumer, 1)
        assert await consumer.receive(1, 1.0) == []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.0):
                await consumer.close()
        await broker.close()
        assert await counts(other) == {"ready": 1}

    play(scenario)


def test_what_was_lost_is_not_kept(play: Play) -> None:
    """Or every lease that ends would cost a worker the memory of its message, for good."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", str(number)) for number in range(3)])
        consumer = await broker.consume("q")
        first, second, third = await take(consumer, 3)
        first.receipt.until = second.receipt.until = 0.0
        # The other is not heard of any more: its handler was stopped as over while the service was away.
        assert await consumer.extend([first, third]) == [first]
        assert list(consumer._here.values()) == [third.receipt]

    play(scenario)


def test_an_ordered_queue_refuses_what_it_would_drop_before_its_time(play: Play) -> None:
    """It is hidden, not stored anew, and the service keeps no message for longer than 14 days."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="plain", pattern="t")])
        await broker.declare([], [Subscription(name="ordered", pattern="t", ordered=True)])
        far = message("t", key="k", not_before=time.time() + 15 * 86_400)
        near = message("t", key="k", not_before=time.time() + 13 * 86_400)
        refused, taken = await broker.publish([far, near])
        assert isinstance(refused, UnsupportedOperation)
        assert refused.capability == "delay"
        assert taken == near.id
        assert {stats.name: stats.ready for stats in await broker.stats()} == {"plain": 1, "ordered": 1}

    play(scenario)


def test_many_who_publish_ask_once_where_to(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a topic holds for seconds, and all who publish find it over in the same moment."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])
        service, _ = broker._opened()
        call, asked = service.call, Counter[str]()

        async def count(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            asked[operation] += 1
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", count)
        sent = [message("t") for _ in range(50)]
        impatient = asyncio.ensure_future(broker.publish(sent[:1]))
        others = [asyncio.ensure_future(broker.publish([one])) for one in sent[1:]]
        await asyncio.sleep(0)
        impatient.cancel()
        assert await asyncio.gather(*others) == [[one.id] for one in sent[1:]]
        assert asked["get_topic_attributes"] == 1

    play(scenario)


def test_storing_letters_anew_holds_few_at_once(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15: every worker does it, beside its work, and there may be any number of them."""
    alive: WeakSet[Copy] = WeakSet()
    most = 0

    def noted(*given: Any) -> Copy:
        nonlocal most
        copy = read(*given)
        alive.add(copy)
        most = max(most, len(alive))
        return copy

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        await broker.publish([message("q", str(number)) for number in range(45)])
        consumer = await broker.consume("q")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await take(consumer, 45)])
        service, topology = broker._opened()
        kept = await topology.find("q")
        monkeypatch.setattr(letters, "read", noted)
        assert await letters.renew(service, kept, 60.0, time.time()) == 0
        assert await letters.renew(service, kept, 0.0, time.time()) == 45
        assert most <= 20
        assert await counts(broker) == {"dead": 45}

    play(scenario)


def test_declared_again_without_its_filter_nothing_is_set_any_more(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """SNS keeps a filter that was taken away as an empty one."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t", where={"region": "eu"})])
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])
        service, _ = broker._opened()
        call = service.call

        async def refuse(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            assert not operation.startswith("set_")
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", refuse)
        await broker.declare([Topic(name="t")], [Subscription(name="s", pattern="t")])

    play(scenario)


@pytest.mark.parametrize("limit", [65_536, 1_048_576])
def test_what_is_published_together_is_no_larger_than_the_topic_takes(
    play: Play, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """``MaximumMessageSize`` of a topic is that of a PublishBatch, too (PublishBatch)."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [])
        service, topology = other._opened()
        call, batches = service.call, list[int]()
        size = {"AttributeName": "MaximumMessageSize", "AttributeValue": str(limit)}
        await call("sns", "set_topic_attributes", TopicArn=await topology.topic_arn("t"), **size)

        async def noted(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            if operation == "publish_batch":
                batches.append(sum(len(one["Message"]) for one in parameters["PublishBatchRequestEntries"]))
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", noted)
        sent = [message("t", "x" * 30_000) for _ in range(10)]
        assert await other.publish(sent) == [one.id for one in sent]
        assert sorted(batches) == ([60_000] * 5 if limit == 65_536 else [300_000])

    play(scenario)


def test_many_queues_are_not_looked_at_all_at_once(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is a connection: hundreds at once are more than a process may open, or a service likes."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        names = [str(number) for number in range(40)]
        await broker.declare(
            [Topic(name=name, queue=True) for name in names],
            [Subscription(name=name, pattern=name) for name in names],
        )
        service, _ = broker._opened()
        call, under_way, most = service.call, 0, 0

        async def noted(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            try:
                return await call(name, operation, **parameters)
            finally:
                under_way -= 1

        monkeypatch.setattr(service, "call", noted)
        assert len(await broker.stats()) == 40
        assert all(finding.level != "error" for finding in await broker.examine())
        assert most <= 32

    play(scenario)


def test_closed_while_it_connects_nothing_stays_open(server: SQSServer) -> None:
    async def scenario() -> None:
        broker = SQSBroker(server.url)
        connecting = asyncio.ensure_future(broker.connect())
        await asyncio.sleep(0)
        await broker.close()
        with pytest.raises(BrokerClosed):
            await connecting
        assert broker._service is None

    asyncio.run(scenario())


def test_all_pages_are_of_one_reading(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whoever turns the pages of ten thousand dead letters would read them all a hundred times."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q")
        sent = [message("q", str(number)) for number in range(50)]
        await broker.publish(sent)
        consumer = await broker.consume("q")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await take(consumer, 50)])
        service, _ = broker._opened()
        call, received = service.call, 0

        async def noted(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            nonlocal received
            received += operation == "receive_message"
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", noted)
        await consumer.close()
        received = 0
        read: list[str] = []
        while page := await broker.dead_letters("q", after=read[-1] if read else None, limit=10):
            read += [item.message.id for item in page]
        assert sorted(read) == sorted(one.id for one in sent)
        assert received <= 8
        first = await broker.dead_letters("q", limit=10)
        assert await broker.discard("q", [read[10]]) == [read[10]]
        (second,) = await broker.dead_letters("q", after=first[-1].message.id, limit=1)
        assert second.message.id == read[11]

    play(scenario)


@pytest.mark.parametrize("ordered", [False, True])
def test_two_messages_of_one_id_are_two_dead_letters(play: Play, ordered: bool) -> None:
    """Another client's ids may be unique in its own source only, as CloudEvents has it: none is lost for the other."""

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await queue(broker, "q", ordered=ordered)
        service, topology = broker._opened()
        url = (await topology.find("q")).url
        for number in range(2):
            sent = {
                "MessageBody": str(number),
                "MessageAttributes": {"ce-id": {"DataType": "String", "StringValue": "1"}},
            }
            fifo = {"MessageGroupId": "any", "MessageDeduplicationId": str(number)} if ordered else {}
            await service.call("sqs", "send_message", QueueUrl=url, **sent, **fifo)
        consumer = await broker.consume("q")
        for _ in range(2):
            (delivery,) = await take(consumer, 1)
            assert await consumer.settle([(delivery, Dead(FAILURE))]) == [None]
        assert [letter.message.body for letter in await broker.dead_letters("q")] == [b"0", b"1"]
        assert await broker.dead_letters("q", after="1") == []
        came: list[str] = []
        for _ in range(2):
            assert await broker.redrive("q", ["1"]) == ["1"]
            (delivery,) = await take(consumer, 1)
            came += bodies([delivery])
            assert await consumer.settle([(delivery, Ack())]) == [None]
        assert sorted(came) == ["0", "1"]
        assert await counts(broker) == {}

    play(scenario)


def test_what_a_queue_is_for_is_not_asked_again_and_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tags the service tells only 30 times a second, to all publishers and dashboards of an account together."""
    monkeypatch.setattr(topology, "ROUTES_HOLD", 0.0)

    async def scenario(broker: SQSBroker, other: SQSBroker) -> None:
        await broker.declare([Topic(name="t")], [Subscription(name="first", pattern="t", ordered=True)])
        service, _ = other._opened()
        call, asked = service.call, list[str]()

        async def noted(name: str, operation: str, **parameters: Any) -> dict[str, Any]:
            asked.append(operation)
            return await call(name, operation, **parameters)

        monkeypatch.setattr(service, "call", noted)
        for _ in range(3):
            await other.publish([message("t", key="k")])
            assert [stats.name for stats in await other.stats()] == ["first"]
        assert asked.count("list_queue_tags") == 1
        await broker.declare([], [Subscription(name="second", pattern="t", ordered=True)])
        await broker.unsubscribe("first")
        sent = message("t", key="k")
        assert await other.publish([sent]) == [sent.id]
        assert [stats.name for stats in await other.stats()] == ["second"]
        assert asked.count("list_queue_tags") == 2
        assert len(await take(await broker.consume("second"), 1)) == 1

    play(scenario)
