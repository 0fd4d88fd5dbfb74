"""Opening, closing, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from postroom.broker.base import Ack
from postroom.errors import BrokerClosed
from postroom.testing.checker import miscounted, total_queue
from postroom.testing.scene import Scene, labels
from postroom.testing.suite import proves, requires


@proves("I16")
async def test_after_close_everything_is_refused(scene: Scene) -> None:
    """after close every call of a broker and its consumers raises BrokerClosed; a second close is fine."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    broker = await scene.another_broker()
    consumer = await scene.consume(queue, broker=broker)
    delivery = await scene.take_one(consumer)
    await broker.close()
    await broker.close()
    await consumer.close()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: broker.connect(),
        lambda: broker.publish([scene.message(queue)]),
        lambda: broker.declare([], []),
        lambda: broker.consume(queue),
        lambda: broker.stats(),
        lambda: broker.dead_letters(queue),
        lambda: broker.redrive(queue, []),
        lambda: broker.discard(queue, []),
        lambda: broker.purge(queue),
        lambda: consumer.receive(1, 0.0),
        lambda: consumer.settle([(delivery, Ack())]),
        lambda: consumer.extend([delivery]),
    ]
    for number, call in enumerate(calls):
        try:
            answer = await call()
        except BrokerClosed:
            continue
        pytest.fail(f"call {number} of a closed broker answered {answer!r} instead of raising BrokerClosed")


@proves("I16")
@requires("jobs")
async def test_after_close_there_is_no_status(scene: Scene) -> None:
    """the job store goes with its broker."""
    broker = await scene.another_broker()
    jobs = broker.jobs
    await broker.close()
    with pytest.raises(BrokerClosed):
        await jobs.get("x")


@proves("C16", "I29")
async def test_closing_a_consumer_releases_at_once(scene: Scene) -> None:
    """all it held is there for others at once, uncounted, started or not, and ahead of what waits."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b"))
    closing, other = await scene.consume(queue), await scene.consume(queue)
    held = await scene.take(closing, 2)
    closing.started(held[:1])
    await scene.publish(scene.message(queue, "c"))
    await closing.close()
    # Ahead only where there is an order.
    expected = ["a", "b"] if scene.harness.capabilities.fifo else ["a", "b", "c"]
    got = await scene.take(other, len(expected))
    assert sorted(labels(got)) == expected
    assert {(delivery.attempt, delivery.suspect) for delivery in got} == {(1, False)}
    assert miscounted(scene.history, queue) == []


@proves("C16", "I29")
async def test_closing_a_broker_closes_its_consumers(scene: Scene) -> None:
    """the same when the whole connection is closed; the other connections go on."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    broker = await scene.another_broker()
    await scene.take_one(await scene.consume(queue, broker=broker))
    await broker.close()
    delivery = await scene.take_one(await scene.consume(queue))
    assert delivery.attempt == 1


@proves("C16")
async def test_a_release_by_close_wakes_the_waiting(scene: Scene) -> None:
    """another consumer that waits gets it without delay."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    closing, other = await scene.consume(queue), await scene.consume(queue)
    await scene.take_one(closing)
    waiting = asyncio.create_task(other.receive(1, None))
    await scene.settle()
    await closing.close()
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["m"]


@proves("I16")
async def test_closing_ends_a_receive_that_waits(scene: Scene) -> None:
    """a consumer closed while it waits tells so, rather than never."""
    queue = await scene.queue()
    for close_broker in (False, True):
        broker = await scene.another_broker()
        consumer = await scene.consume(queue, broker=broker)
        waiting = asyncio.create_task(consumer.receive(1, None))
        await scene.settle()
        await (broker.close() if close_broker else consumer.close())
        with pytest.raises(BrokerClosed):
            async with asyncio.timeout(scene.harness.patience):
                await waiting


@proves("I1")
async def test_continue_after_subscribe_close(scene: Scene) -> None:
    """consumers that come and go, each after a few messages, together get every message once."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, " ".join(f"m{n}" for n in range(50))))
    done = 0
    while done < 50:
        consumer = await scene.consume(queue)
        deliveries = await scene.receive(consumer, 8)
        assert deliveries, f"only {done} of 50 came"
        await scene.ack(consumer, *deliveries[:5])
        done += len(deliveries[:5])
        await consumer.close()
    await scene.nothing(await scene.consume(queue))
    assert await scene.counts(queue) == {}


@proves("I3")
async def test_continue_after_errors(scene: Scene) -> None:
    """three consumers that each fail or give back much lose nothing: in the end all fifty are done."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, " ".join(f"m{n}" for n in range(50))))
    for _ in range(3):
        consumer = await scene.consume(queue)
        for delivery in await scene.take(consumer, 50):
            await scene.fail(consumer, delivery)
        await consumer.close()
    last = await scene.consume(queue)
    assert len(await scene.drain(last, count=50)) == 50
    found = total_queue(scene.history, queue)
    assert found.valid, found


@proves("I16")
async def test_concurrent_close(scene: Scene) -> None:
    """closing from many sides at once, while others publish and receive, neither hangs nor fails."""
    queue = await scene.queue()
    broker = await scene.another_broker()
    consumers = [await scene.consume(queue, broker=broker) for _ in range(5)]
    receives = [asyncio.create_task(consumer.receive(1, None)) for consumer in consumers]
    await scene.settle()
    async with asyncio.timeout(scene.harness.patience):
        await asyncio.gather(broker.close(), *(consumer.close() for consumer in consumers), broker.close())
        results = await asyncio.gather(*receives, return_exceptions=True)
    assert all(isinstance(result, BrokerClosed) for result in results), results


@proves("C1")
async def test_publisher_close(scene: Scene) -> None:
    """what was being published while the broker closes is either confirmed and there, or refused; never in between."""
    queue = await scene.queue()
    producer = await scene.another_broker()
    sent = scene.messages(queue, " ".join(f"m{n}" for n in range(30)))
    publishing = [asyncio.create_task(producer.publish([message])) for message in sent]
    await asyncio.sleep(0)
    await producer.close()
    answers = await asyncio.gather(*publishing, return_exceptions=True)
    confirmed = {message.id for message, answer in zip(sent, answers, strict=True) if answer == [message.id]}
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, BrokerClosed) for answer in refused), refused
    assert len(confirmed) + len(refused) == 30
    consumer = await scene.consume(queue)
    got = await scene.take(consumer, len(confirmed)) if confirmed else []
    assert {delivery.message.id for delivery in got} == confirmed
    await scene.nothing(consumer)


@proves("C17")
@requires("durability")
async def test_reconnect(scene: Scene) -> None:
    """with restarts at a third and at half, every confirmed message arrives."""
    queue = await scene.queue()
    for number in range(60):
        await scene.publish(scene.message(queue, f"m{number}"))
        if number in (20, 30):
            await scene.restart()
    drained = await scene.drain(await scene.consume(queue), count=60)
    assert len(drained) == 60
    found = total_queue(scene.history, queue)
    assert found.valid, found


@proves("C1")
async def test_a_constructor_does_no_io(scene: Scene) -> None:
    """a broker that was only made, or made and closed, touches nothing."""
    unused = scene.harness.make_broker()
    await unused.close()
    await scene.queue()
