"""Many at once: the history of the run is checked as a whole."""

from __future__ import annotations

import asyncio

from postroom.broker.base import Release
from postroom.testing.checker import held_twice, miscounted, resurrected, total_queue
from postroom.testing.scene import Scene
from postroom.testing.suite import proves

_LONG = 60.0
"""Seconds: the lease where nobody dies. However slow the machine is, none runs out."""


def _check(scene: Scene, subscription: str) -> None:
    found = total_queue(scene.history, subscription)
    assert found.valid, found
    assert resurrected(scene.history, subscription) == []
    assert held_twice(scene.history, subscription) == []
    if scene.harness.capabilities.start_notes:
        # Else what a frozen holder had not started counts as well.
        assert miscounted(scene.history, subscription) == []


@proves("I1", "I3", "I9")
async def test_concurrent_subscribe(scene: Scene) -> None:
    """a thousand messages and twenty consumers of two connections: each message once across all."""
    queue = await scene.queue()
    brokers = [scene.broker, await scene.another_broker()]
    consumers = [await scene.consume(queue, lease=_LONG, broker=brokers[n % 2]) for n in range(20)]

    async def produce() -> None:
        for batch in range(20):
            sent = [scene.message(queue, f"m{batch}.{n}") for n in range(50)]
            await scene.publish(*sent, broker=brokers[batch % 2])

    drained, _ = await asyncio.gather(scene.drain(*consumers, count=1000), produce())
    assert len(drained) == 1000, f"{len(drained)} of 1000 came"
    for consumer in consumers[:2]:
        await scene.nothing(consumer)
    _check(scene, queue)


@proves("I1", "C9")
async def test_concurrent_subscribe_multiple_topics(scene: Scene) -> None:
    """ten topics with a subscription each, all at once: each has its own hundred."""
    topics = [await scene.topic() for _ in range(10)]
    names = [await scene.subscribe(topic) for topic in topics]

    async def produce_and_drain(topic: str, name: str) -> int:
        consumer = await scene.consume(name, lease=_LONG)
        await scene.publish(*scene.messages(topic, " ".join(f"m{n}" for n in range(100))))
        drained = await scene.drain(consumer, count=100)
        assert {delivery.message.topic for delivery in drained} == {topic}
        return len(drained)

    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(produce_and_drain(*pair)) for pair in zip(topics, names, strict=True)]
    assert [run.result() for run in runs] == [100] * 10
    for name in names:
        assert await scene.counts(name) == {}


@proves("I1", "I3", "I4", "I9", "I10", "I13")
async def test_nothing_is_lost_among_failures(scene: Scene) -> None:
    """producers and consumers at once, with failures, releases and frozen holders: the whole history holds."""
    queue = await scene.queue()
    consumers = [await scene.consume(queue) for _ in range(4)]
    published = done = 0
    for turn in range(400):
        if published < 100:
            await scene.publish(*scene.messages(queue, f"m{turn}a m{turn}b"))
            published += 2
        consumer = consumers[turn % 4]
        for number, delivery in enumerate(await scene.receive(consumer, 3, wait=False)):
            if (turn + number) % 11 == 3:
                continue  # Frozen: its lease will run out.
            if (turn + number) % 7 == 2:
                await scene.fail(consumer, delivery)
            elif (turn + number) % 5 == 1:
                await scene.do(consumer, Release(), delivery)
            else:
                await scene.ack(consumer, delivery)
                done += 1
        # Between two steps only exact numbers add up.
        counts = await scene.counts(queue) if scene.harness.capabilities.exact_stats else {"open": published - done}
        assert done + sum(counts.values()) == published, f"turn {turn}: {done} done, {counts}, {published} published"
        if turn % 50 == 49:
            await scene.pass_time(scene.lease + scene.unit)
        if published == 100 and done == 100:
            break
    drained = await scene.drain(*consumers, count=100 - done)
    assert done + len(drained) == 100
    _check(scene, queue)
