"""Lanes: what only they can do wrong, beside the conformance suite."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest

from postroom import App, BrokerUnavailable, ConfigurationError, TopicNotFound, UnsupportedOperation
from postroom.broker import registry
from postroom.broker.base import (
    PRIORITIES,
    Ack,
    Broker,
    Consumer,
    Dead,
    Delivery,
    Outcome,
    Retry,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.broker.lanes import LanedBroker
from postroom.broker.lanes.consumer import LaneConsumer
from postroom.broker.lanes.names import take_levels
from postroom.broker.memory import MemoryBroker
from postroom.errors import SettlementError
from postroom.message import Message, new_id
from postroom.testing.clock import ManualClock
from postroom.testing.scene import failure
from tests.conformance.test_lanes import Level


def message(topic: str = "mail", **options: Any) -> Message:
    return Message(id=new_id(), topic=topic, name="work", body=b"{}", **options)


class Place:
    """A laned broker, the one below it, and what a test does with them."""

    def __init__(self, levels: frozenset[int]) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"
        self.inner = Level(self._url, clock=self.clock)
        self.broker = LanedBroker(self.inner, levels, clock=self.clock)

    async def open(self, *, ordered: bool = False) -> None:
        await self.broker.connect()
        queue = Subscription(name="mail", pattern="mail", ordered=ordered)
        await self.broker.declare([Topic(name="mail", queue=True)], [queue])


def play(
    story: Callable[[Place], Awaitable[None]], *, ordered: bool = False, levels: frozenset[int] = PRIORITIES
) -> None:
    async def main() -> None:
        place = Place(levels)
        await place.open(ordered=ordered)
        try:
            await story(place)
        finally:
            await place.broker.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "rest", "levels"),
    [
        ("sqs://eu-west-1", "sqs://eu-west-1", set()),
        ("sqs://eu-west-1?priorities=5,9", "sqs://eu-west-1", {5, 9}),
        ("kafka://u:p%3F@h?a=%26b&priorities=1&c=", "kafka://u:p%3F@h?a=%26b&c=", {1}),
    ],
)
def test_the_url_names_the_levels(url: str, rest: str, levels: set[int]) -> None:
    assert take_levels(url) == (rest, levels)


@pytest.mark.parametrize("value", ["", "0", "10", "5;9", "high", "5,9&priorities=1"])
def test_levels_that_are_none(value: str) -> None:
    with pytest.raises(ConfigurationError, match="priorities=") as refused:
        take_levels(f"amqp://me:secret@host/?priorities={value}")
    assert "secret" not in str(refused.value)


def test_the_registry_makes_lanes() -> None:
    assert isinstance(registry.make_broker("sqs://eu-west-1?priorities=5"), LanedBroker)
    assert not isinstance(registry.make_broker("sqs://eu-west-1"), LanedBroker)
    with pytest.raises(ConfigurationError, match="priorities of its own"):
        registry.make_broker("memory://?priorities=5")


def test_what_has_no_lane_is_refused() -> None:
    async def story(place: Place) -> None:
        await place.broker.declare([Topic(name="events")], [])
        wanted = [message(priority=5), message("events", priority=5), message(priority=3), message("mail")]
        answers = await place.broker.publish(wanted)
        assert [type(answer) for answer in answers] == [UnsupportedOperation] * 3 + [str]
        assert "'events' has no lane for it" in str(answers[1])
        (unknown,) = await place.broker.publish([message("unknown")])
        assert isinstance(unknown, TopicNotFound)

    play(story, ordered=True)


def test_names_of_lanes_are_ours() -> None:
    async def story(place: Place) -> None:
        name = "mail.priority-5"
        with pytest.raises(ConfigurationError, match="kept for priorities"):
            await place.broker.declare([Topic(name=name, queue=True)], [Subscription(name=name, pattern=name)])

    play(story)


def test_one_suspect_of_all_lanes() -> None:
    """Two lanes each have one; the second waits, uncounted, until the first is settled."""

    async def story(place: Place) -> None:
        first = await place.broker.consume("mail")
        await place.broker.publish([message(priority=level) for level in (0, 5)])
        dying = await first.receive(2, 0.0)
        first.started(dying)
        await place.clock.advance(31.0)
        await first.close()
        second = await place.broker.consume("mail")
        (held,) = await second.receive(2, 0.0)
        assert (held.suspect, held.message.priority) == (True, 5)
        await place.clock.advance(1.0)
        assert await second.receive(2, 0.0) == []
        assert await second.settle([(held, Retry(delay=60.0, failure=failure(2), suspect=True))]) == [None]
        await place.clock.advance(1.0)
        (other,) = await second.receive(2, 0.0)
        assert (other.suspect, other.message.priority, other.attempt) == (True, 0, 2)

    play(story)


def test_a_suspect_whose_lease_has_ended_holds_up_none() -> None:
    async def story(place: Place) -> None:
        consumer = await place.broker.consume("mail")
        await place.broker.publish([message(priority=level) for level in (0, 5)])
        consumer.started(await consumer.receive(2, 0.0))
        await place.clock.advance(31.0)
        assert [delivery.message.priority for delivery in await consumer.receive(2, 0.0)] == [5]
        await place.clock.advance(31.0)
        assert [delivery.message.priority for delivery in await consumer.receive(1, 0.0)] == [5]

    play(story)


class Lane(Consumer):
    """Hands out what a test gives it, and settles or fails as it says."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.waiting = list(deliveries)
        self.settled: list[Outcome] = []
        self.away = False
        self.waits = 0
        self.ready = asyncio.Event()

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        if timeout != 0.0:
            self.waits += 1
            await self.ready.wait()
        given, self.waiting = self.waiting[:max_messages], self.waiting[max_messages:]
        return given

    def started(self, deliveries: Sequence[Delivery]) -> None:
        raise AssertionError("not asked")

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        if self.away:
            raise BrokerUnavailable("away")
        self.settled += [outcome for _, outcome in settlements]
        return [None for _ in settlements]

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return [delivery for delivery in deliveries if self.away]

    async def close(self) -> None:
        pass


def delivery(**options: Any) -> Delivery:
    return Delivery(message=message(), subscription="mail", attempt=1, **options)


def with_lanes(story: Callable[[LaneConsumer, Lane, Lane], Awaitable[None]], *, count: int = 1) -> None:
    async def main() -> None:
        high, low = (Lane(*(delivery() for _ in range(count))) for _ in range(2))
        await story(LaneConsumer("mail", {low: 0, high: 5}, 30.0, ManualClock()), high, low)

    asyncio.run(main())


def test_a_settle_that_failed_in_one_lane_only() -> None:
    """Asked again it settles what is left, and tells of the others what was answered."""

    async def story(consumer: LaneConsumer, high: Lane, low: Lane) -> None:
        deliveries = await consumer.receive(2, 0.0)
        low.away = True
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                await consumer.settle([(item, Ack()) for item in deliveries])
        low.away = False
        assert await consumer.settle([(item, Ack()) for item in deliveries]) == [None, None]
        assert (high.settled, low.settled) == ([Ack()], [Ack()])

    with_lanes(story)


def test_two_lanes_answer_at_once() -> None:
    """Of those that wait side by side no more is handed out than was asked for; the rest goes back, uncounted."""

    async def story(consumer: LaneConsumer, high: Lane, low: Lane) -> None:
        waiting = asyncio.ensure_future(consumer.receive(1, None))
        # Looked into from the highest down, then waited for together.
        while (high.waits, low.waits) != (3, 2):  # noqa: ASYNC110 -- told by no event
            await asyncio.sleep(0.01)
        high.ready.set()
        low.ready.set()
        (taken,) = await waiting
        assert taken.message.priority == 5
        assert (high.settled, [type(outcome).__name__ for outcome in low.settled]) == ([], ["Release"])

    with_lanes(story)


def test_what_a_failing_receive_had_taken_goes_back() -> None:
    async def story(consumer: LaneConsumer, high: Lane, low: Lane) -> None:
        async def fail(max_messages: int, timeout: float | None) -> list[Delivery]:
            raise BrokerUnavailable("away")

        low.receive = fail  # type: ignore[method-assign]
        with pytest.raises(BrokerUnavailable):
            await consumer.receive(2, 0.0)
        assert [type(outcome).__name__ for outcome in high.settled] == ["Release"]

    with_lanes(story)


def test_extend_tells_what_is_lost_in_each_lane() -> None:
    async def story(consumer: LaneConsumer, high: Lane, low: Lane) -> None:
        deliveries = await consumer.receive(2, 0.0)
        low.away = True
        assert await consumer.extend(deliveries) == [item for item in deliveries if item.message.priority == 0]

    with_lanes(story)


def test_the_doctor_finds_lanes_that_nobody_serves() -> None:
    async def story(place: Place) -> None:
        await place.broker.publish([message(priority=5), message(priority=9)])
        narrow = LanedBroker(place.inner, frozenset({5}))
        found = {finding.title: finding for finding in await narrow.examine()}["priorities"]
        assert found.level == "error"
        assert "mail.priority-9" in found.detail
        assert "?priorities=5,9" in found.remedy
        assert {finding.title: finding.level for finding in await place.broker.examine()}["priorities"] == "ok"

    play(story)


def test_many_dead_letters_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postroom.broker.lanes.broker._PAGE", 3)

    async def story(place: Place) -> None:
        await place.broker.publish([message(priority=level) for level in (0, 5) for _ in range(6)])
        consumer = await place.broker.consume("mail")
        deliveries = await consumer.receive(12, 0.0)
        assert await consumer.settle([(item, Dead(failure())) for item in deliveries]) == [None] * 12
        assert len(await place.broker.dead_letters("mail")) == 12

    play(story)


class Nines(App):
    """On a broker that keeps only the priority 9 apart."""

    def make_broker(self) -> Broker:
        return LanedBroker(Level(self.url), frozenset({9}))


def test_an_app_that_asks_for_other_levels_does_not_start() -> None:
    app = Nines(f"memory://{uuid4().hex}")

    @app.task(priority=5)
    def work() -> None: ...

    with app, pytest.raises(UnsupportedOperation, match=r"task 'work': priority=5: .* add \?priorities=5,9 to its URL"):
        app.connect()


def test_a_job_of_another_level_is_refused() -> None:
    app = Nines(f"memory://{uuid4().hex}")

    @app.task(priority=9)
    def work() -> None: ...

    with app:
        work.enqueue()
        with pytest.raises(UnsupportedOperation, match=r"add \?priorities=5,9 to its URL"):
            work.using(priority=5).enqueue()


def test_numbers_of_a_queue_are_the_sums_of_its_lanes() -> None:
    async def story(place: Place) -> None:
        await place.broker.publish([message(priority=5), message(not_before=place.clock.now() + 60)])
        await place.clock.advance(3.0)
        await place.broker.publish([message()])
        assert await place.broker.stats() == [
            SubscriptionStats(
                name="mail",
                pattern="mail",
                queue=True,
                ready=2,
                delayed=1,
                running=0,
                dead=0,
                oldest=pytest.approx(3.0),
            )
        ]

    play(story)


def test_a_sound_broker_needs_no_lanes() -> None:
    with pytest.raises(ConfigurationError, match="of its own"):
        LanedBroker(MemoryBroker("memory://"), PRIORITIES)
