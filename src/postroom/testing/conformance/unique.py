"""Unique messages: one key, one message, as long as the first waits or runs."""

from __future__ import annotations

import asyncio
from typing import Any

from postroom.broker.base import Ack, Broker, Dead
from postroom.errors import IdempotencyConflict
from postroom.message import JobState, Message, Unique
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


def _unique(scene: Scene, queue: str, unique: Unique, label: str = "same", **options: Any) -> Message:
    return scene.message(queue, label, idempotency_key="k", unique=unique, **options)


@proves("C11", "I17")
@requires("unique", "jobs")
async def test_unique_until_done(scene: Scene) -> None:
    """the first keeps others out while it waits, runs and waits for a retry; no longer once it has ended in any way."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    for end in (Ack(), Dead(failure()), None):
        first = _unique(scene, queue, "until_done")
        assert await scene.publish(first) == [first.id]
        assert await scene.publish(_unique(scene, queue, "until_done")) == [first.id]
        assert isinstance(await scene.refused(_unique(scene, queue, "until_done", "other")), IdempotencyConflict)
        if end is None:
            assert await scene.broker.jobs.cancel(first.id) == "cancelled"
            break
        delivery = await scene.take_one(consumer)
        assert await scene.publish(_unique(scene, queue, "until_done")) == [first.id]
        await scene.fail(consumer, delivery)
        assert await scene.publish(_unique(scene, queue, "until_done")) == [first.id]
        await scene.do(consumer, end, await scene.take_one(consumer))
    last = _unique(scene, queue, "until_done")
    assert await scene.publish(last) == [last.id]
    assert (await scene.take_one(consumer)).message.id == last.id
    await scene.nothing(consumer)


@proves("C11", "I17")
@requires("unique")
async def test_unique_until_started(scene: Scene) -> None:
    """the first keeps others out only while it waits for its first start."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    first, second = _unique(scene, queue, "until_started"), _unique(scene, queue, "until_started")
    assert await scene.publish(first, _unique(scene, queue, "until_started")) == [first.id, first.id]
    running = await scene.take_one(consumer)
    assert await scene.publish(second) == [second.id]
    await scene.fail(consumer, running, delay=10 * scene.unit)
    assert await scene.publish(_unique(scene, queue, "until_started")) == [second.id]
    assert labels(await scene.take(consumer)) == ["same"]
    third = _unique(scene, queue, "until_started")
    assert await scene.publish(third) == [third.id]


@proves("C11")
@requires("unique", "jobs")
async def test_replace(scene: Scene) -> None:
    """debounce: what waits is cancelled and the later message takes its place; what has started is left alone."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    later = scene.now() + 10 * scene.unit
    first = _unique(scene, queue, "until_started", "first", not_before=later, replace=True)
    second = _unique(scene, queue, "until_started", "second", replace=True)
    third = _unique(scene, queue, "until_started", "third", replace=True)
    assert await scene.publish(first) == [first.id]
    assert await scene.publish(second) == [second.id]
    assert (await scene.record(first.id)).state is JobState.CANCELLED
    running = await scene.take_one(consumer)
    assert labels([running]) == ["second"]
    assert await scene.publish(third) == [third.id]
    assert (await scene.record(second.id)).state is JobState.RUNNING
    await scene.ack(consumer, running)
    await scene.ack(consumer, last := await scene.take_one(consumer))
    assert labels([last]) == ["third"]
    await scene.pass_time(12 * scene.unit)
    await scene.nothing(consumer)


@proves("C11")
@requires("unique", "jobs")
async def test_replace_within_a_batch(scene: Scene) -> None:
    """the last one counts; publishing it once more, under its own id, changes nothing."""
    queue = await scene.queue()
    sent = [_unique(scene, queue, "until_started", label, replace=True) for label in "abc"]
    assert await scene.publish(*sent) == [message.id for message in sent]
    assert await scene.publish(sent[-1]) == [sent[-1].id]
    assert [(await scene.record(message.id)).state for message in sent[:2]] == [JobState.CANCELLED] * 2
    consumer = await scene.consume(queue)
    assert labels(await scene.take(consumer)) == ["c"]
    await scene.nothing(consumer)


@proves("C11", "I17")
@requires("unique", "jobs")
async def test_what_was_replaced_stays_replaced(scene: Scene) -> None:
    """published once more, as after a lost answer, it neither runs nor takes anything from what came after it."""
    queue = await scene.queue()
    first, second, third = (_unique(scene, queue, "until_started", label, replace=True) for label in "abc")
    await scene.publish(first)
    await scene.publish(second)
    assert await scene.publish(first) == [first.id]
    assert (await scene.record(first.id)).state is JobState.CANCELLED
    assert (await scene.record(second.id)).state is JobState.READY
    await scene.publish(third)
    consumer = await scene.consume(queue)
    assert labels(await scene.take(consumer)) == ["c"]
    await scene.nothing(consumer)


@proves("C11", "I17")
@requires("unique")
async def test_unique_among_many_publishers(scene: Scene) -> None:
    """many publish at the same time: one message; with ``replace`` one that waits in the end."""
    brokers = [scene.broker, await scene.another_broker()]
    for replace, unique in ((False, "until_done"), (True, "until_started")):
        queue = await scene.queue()
        consumer = await scene.consume(queue)
        sent = [_unique(scene, queue, unique, replace=replace) for _ in range(20)]  # type: ignore[arg-type]

        async def publish(message: Message, broker: Broker) -> str:
            (answer,) = await broker.publish([message])
            assert isinstance(answer, str)
            return answer

        answers = await asyncio.gather(*(publish(message, brokers[n % 2]) for n, message in enumerate(sent)))
        assert len(set(answers)) == (20 if replace else 1)
        (delivery,) = await scene.take(consumer)
        assert delivery.message.id in answers
        await scene.nothing(consumer)


@proves("C11", "I17")
@requires("unique", "durability")
async def test_unique_survives_a_restart(scene: Scene) -> None:
    """the first still keeps others out."""
    queue = await scene.queue()
    first = _unique(scene, queue, "until_done")
    await scene.publish(first)
    await scene.restart()
    assert await scene.publish(_unique(scene, queue, "until_done")) == [first.id]
