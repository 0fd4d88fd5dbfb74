"""What receive promises: one consumer each, everything, no more than asked for, nothing lost by a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from postroom.broker.base import Ack, Dead, Delivery
from postroom.errors import SubscriptionNotFound
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


@proves("C3", "I28")
async def test_no_more_than_asked_for(scene: Scene) -> None:
    """receive gives at most max_messages, and those are gone for the others."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c d e"))
    one, other = await scene.consume(queue), await scene.consume(queue)
    first = await scene.receive(one, 2)
    assert 1 <= len(first) <= 2
    rest = await scene.take(other, 5 - len(first))
    assert sorted(labels(first) + labels(rest)) == ["a", "b", "c", "d", "e"]
    await scene.nothing(one)


@proves("C3")
async def test_consumers_of_two_brokers_compete(scene: Scene) -> None:
    """each message goes to exactly one consumer, also when these belong to different connections."""
    queue = await scene.queue()
    one = await scene.consume(queue)
    other = await scene.consume(queue, broker=await scene.another_broker())
    await scene.publish(*scene.messages(queue, "a b"))
    got = [await scene.take_one(one), await scene.take_one(other)]
    assert sorted(labels(got)) == ["a", "b"]


@proves("C2")
async def test_a_message_of_another_broker_wakes_the_waiting(scene: Scene) -> None:
    """a receive that waits returns once somebody publishes, without a poll by the user."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    producer = await scene.another_broker()
    waiting = asyncio.create_task(consumer.receive(1, None))
    await scene.settle()
    assert not waiting.done()
    await scene.publish(scene.message(queue, "late"), broker=producer)
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["late"]


@proves("C2")
async def test_receive_waits_no_longer_than_asked(scene: Scene) -> None:
    """an empty list when the time is over, not earlier."""
    consumer = await scene.consume(await scene.queue())
    waiting = asyncio.create_task(consumer.receive(1, scene.unit))
    await scene.pass_time(scene.unit / 2)
    assert not waiting.done(), "it must wait for its timeout"
    await scene.pass_time(scene.unit)
    async with asyncio.timeout(scene.harness.patience):
        assert await waiting == []


@proves("C2")
async def test_receive_returns_with_the_first(scene: Scene) -> None:
    """receive does not wait for the batch to be full."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    waiting = asyncio.create_task(consumer.receive(10, None))
    await scene.settle()
    await scene.publish(scene.message(queue, "only"))
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["only"]


@proves("I1")
async def test_a_cancelled_receive_loses_nothing(scene: Scene) -> None:
    """a receive cancelled while it waits, or as the message comes, leaves it for the next; uncounted."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    for number in range(10):
        waiting = asyncio.create_task(consumer.receive(1, None))
        await scene.settle()
        publishing = asyncio.create_task(scene.publish(scene.message(queue, f"m{number}")))
        for _ in range(number):
            await asyncio.sleep(0)
        waiting.cancel()
        await publishing
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        got = result if isinstance(result, list) else [await scene.take_one(consumer)]
        assert labels(got) == [f"m{number}"]
        assert got[0].attempt == 1
        await consumer.settle([(delivery, Ack()) for delivery in got])


@proves("C2")
async def test_no_ack(scene: Scene) -> None:
    """what is not acked stays with its consumer: it comes neither twice, nor to others, while the lease lives."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    one, other = await scene.consume(queue), await scene.consume(queue)
    delivery = await scene.take_one(one)
    await scene.pass_time(scene.lease / 2)
    await scene.nothing(one)
    await scene.nothing(other)
    await scene.ack(one, delivery)
    await scene.pass_time(scene.lease * 2)
    await scene.nothing(other)


@proves("I16")
async def test_unknown_subscription_is_refused(scene: Scene) -> None:
    """a subscription that nobody declared is an error, whatever is asked of it."""
    name = scene.name("nowhere")
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.consume(name)
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.dead_letters(name)
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.redrive(name, [])
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.discard(name, [])
    with pytest.raises(SubscriptionNotFound):
        await scene.broker.purge(name)


@proves("I13")
@requires("exact_stats")
async def test_stats_count_every_message_once(scene: Scene) -> None:
    """ready, running and dead add up to what was published and not done; oldest is the age of the oldest ready."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c d e"))
    await scene.pass_time(scene.unit)
    consumer = await scene.consume(queue)
    first, second, _ = await scene.take(consumer, 3)
    await scene.ack(consumer, first)
    await scene.do(consumer, Dead(failure()), second)
    assert await scene.counts(queue) == {"ready": 2, "running": 1, "dead": 1}
    stats = await scene.stats(queue)
    assert (stats.pattern, stats.queue) == (queue, True)
    assert stats.oldest is not None
    assert scene.unit <= stats.oldest <= scene.unit * 2 + scene.harness.slack


@proves("I13")
async def test_stats_of_an_empty_subscription(scene: Scene) -> None:
    """nothing is nothing, and has no age; stats come sorted by name."""
    name = await scene.subscribe(await scene.topic())
    assert await scene.counts(name) == {}
    stats = await scene.stats(name)
    assert (stats.oldest, stats.queue) == (None, False)
    names = [found.name for found in await scene.broker.stats()]
    assert names == sorted(names)


@proves("C2")
async def test_purge_takes_only_what_waits(scene: Scene) -> None:
    """purge deletes the waiting; the running can still be settled, the dead are kept."""
    queue = await scene.queue()
    await scene.bury(queue, scene.message(queue, "dead"))
    await scene.publish(*scene.messages(queue, "running a b"))
    consumer = await scene.consume(queue)
    running = await scene.take_one(consumer)
    assert await scene.broker.purge(queue) == 2
    assert await scene.counts(queue) == {"running": 1, "dead": 1}
    await scene.nothing(consumer)
    await scene.ack(consumer, running)
    assert labels(await scene.broker.dead_letters(queue)) == ["dead"]
    await scene.publish(scene.message(queue, "later"))
    assert labels(await scene.take(consumer)) == ["later"]


@proves("C2")
async def test_looking_in_without_waiting(scene: Scene) -> None:
    """who only ever asks for what is there finds it; a broker may need a moment to fetch it."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    assert await consumer.receive(1, 0.0) == []
    await scene.publish(scene.message(queue, "a"))
    async with asyncio.timeout(scene.harness.patience):
        while not (found := await consumer.receive(1, 0.0)):
            await scene.pass_time(scene.unit / 10)
    assert labels(found) == ["a"]


@proves("C15")
async def test_room_for_more_than_there_can_be(scene: Scene) -> None:
    """a hundred thousand at once is a demand like any other."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    await scene.publish(*scene.messages(queue, "a b"))
    found: list[Delivery] = []
    while len(found) < 2:
        more = await scene.receive(consumer, 100_000)
        assert more, f"two were published, these came: {labels(found)}"
        found += more
    assert sorted(labels(found)) == ["a", "b"]
