"""Time: never early, expired never, higher priority first."""

from __future__ import annotations

import asyncio

from postroom.broker.base import Release
from postroom.testing.scene import Scene, labels
from postroom.testing.suite import proves, requires


@proves("I27", "C6")
@requires("delay")
async def test_never_early(scene: Scene) -> None:
    """a message for later is not delivered before its time, and then is."""
    queue = await scene.queue()
    consumer = await scene.consume(queue, lease=20 * scene.unit)
    await scene.publish(
        scene.message(queue, "later", not_before=scene.now() + 2 * scene.unit), scene.message(queue, "now")
    )
    assert labels([await scene.take_one(consumer)]) == ["now"]
    assert await scene.counts(queue) == {"delayed": 1, "running": 1}
    await scene.pass_time(scene.unit)
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    assert labels([await scene.take_one(consumer)]) == ["later"]


@proves("I27")
@requires("delay")
async def test_a_time_that_is_over_is_now(scene: Scene) -> None:
    """a not_before in the past delays nothing."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, not_before=scene.now() - 100.0))
    await scene.take_one(await scene.consume(queue))


@proves("I27")
@requires("delay")
async def test_a_waiting_consumer_is_woken_on_time(scene: Scene) -> None:
    """a receive that waits returns on time, also for one published meanwhile and due before another."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    waiting = asyncio.create_task(consumer.receive(1, None))
    await scene.settle()
    now = scene.now()
    await scene.publish(scene.message(queue, "second", not_before=now + 9 * scene.unit))
    await scene.publish(scene.message(queue, "first", not_before=now + 2 * scene.unit))
    await scene.pass_time(scene.unit)
    assert not waiting.done()
    await scene.pass_time(scene.unit)
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["first"]


@proves("I5", "C6")
async def test_a_retry_waits_its_delay(scene: Scene) -> None:
    """the next delivery is not before the delay is over, holds no lease meanwhile, and others flow."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "failed"))
    consumer = await scene.consume(queue, lease=20 * scene.unit)
    await scene.fail(consumer, await scene.take_one(consumer), delay=2 * scene.unit)
    await scene.publish(scene.message(queue, "other"))
    assert labels([await scene.take_one(consumer)]) == ["other"]
    assert await scene.counts(queue) == {"delayed": 1, "running": 1}
    await scene.pass_time(scene.unit)
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    delivery = await scene.take_one(consumer)
    assert (labels([delivery]), delivery.attempt) == (["failed"], 2)


@proves("I5", "C6")
async def test_a_snooze_waits_its_delay(scene: Scene) -> None:
    """a release with a delay is not early either, and not counted."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    await scene.do(consumer, Release(delay=2 * scene.unit), await scene.take_one(consumer))
    await scene.pass_time(scene.unit)
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    assert (await scene.take_one(consumer)).attempt == 1


@proves("I27")
@requires("delay")
async def test_a_delay_is_longer_than_a_lease(scene: Scene) -> None:
    """a delay far beyond the lease is kept, and delivers once."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, not_before=scene.now() + 3 * scene.lease))
    consumer = await scene.consume(queue)
    await scene.pass_time(2 * scene.lease)
    await scene.nothing(consumer)
    await scene.pass_time(scene.lease + scene.unit)
    await scene.take_one(consumer)
    await scene.nothing(consumer)


@proves("I27")
@requires("delay", "durability")
async def test_a_delay_survives_a_restart(scene: Scene) -> None:
    """neither forgotten nor early after a restart."""
    queue = await scene.queue()
    due = scene.now() + scene.harness.outage + 3 * scene.unit
    await scene.publish(scene.message(queue, not_before=due))
    await scene.restart()
    consumer = await scene.consume(queue)
    await scene.nothing(consumer)
    await scene.pass_time(due - scene.now())
    await scene.take_one(consumer)


@proves("C2")
@requires("expiry")
async def test_the_expired_is_never_delivered(scene: Scene) -> None:
    """after its expires_at a message that waits is dropped; one without goes on."""
    queue = await scene.queue()
    await scene.publish(
        scene.message(queue, "fresh", expires_at=scene.now() + 100 * scene.unit),
        scene.message(queue, "stale", expires_at=scene.now() + scene.unit),
        scene.message(queue, "over", expires_at=scene.now() - 1.0),
    )
    await scene.pass_time(1.5 * scene.unit)
    consumer = await scene.consume(queue)
    assert labels([await scene.take_one(consumer)]) == ["fresh"]
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {"running": 1}
    assert await scene.broker.dead_letters(queue) == []


@proves("C2", "I3")
@requires("expiry")
async def test_the_expired_among_others(scene: Scene) -> None:
    """a receive that comes across expired messages gives each of the others once."""
    queue = await scene.queue()
    stale = scene.now() + scene.unit
    for label in ["a1", "b0", "c1", "d0", "e1"]:
        await scene.publish(scene.message(queue, label, expires_at=stale if label.endswith("0") else None))
    await scene.pass_time(1.5 * scene.unit)
    consumer = await scene.consume(queue)
    assert sorted(labels(await scene.take(consumer, 3))) == ["a1", "c1", "e1"]
    await scene.nothing(consumer)


@proves("C2")
@requires("expiry")
async def test_expiry_does_not_end_what_runs(scene: Scene) -> None:
    """a message started in time may be settled later."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    await scene.publish(scene.message(queue, expires_at=scene.now() + scene.unit))
    delivery = await scene.take_one(consumer)
    await scene.pass_time(2 * scene.unit)
    await scene.ack(consumer, delivery)


@proves("C2")
@requires("expiry")
async def test_a_retry_after_expiry_is_not_delivered(scene: Scene) -> None:
    """not started later than its expires_at: that holds for each attempt."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    await scene.publish(scene.message(queue, expires_at=scene.now() + scene.unit))
    await scene.fail(consumer, await scene.take_one(consumer), delay=2 * scene.unit)
    await scene.pass_time(3 * scene.unit)
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {}


@proves("C15")
@requires("expiry", "limits")
async def test_the_expired_makes_room(scene: Scene) -> None:
    """what has expired does not count towards the limit, even if nobody consumes."""
    queue = await scene.queue(limit=1)
    await scene.publish(scene.message(queue, expires_at=scene.now() + scene.unit))
    await scene.pass_time(2 * scene.unit)
    await scene.publish(scene.message(queue, "next"))


@proves("C2")
@requires("priorities", "fifo")
async def test_higher_priority_first(scene: Scene) -> None:
    """9 before 5 before 0; within one priority the longer ready."""
    queue = await scene.queue()
    for label, priority in (("a0", 0), ("b5", 5), ("c9", 9), ("d5", 5), ("e0", 0)):
        await scene.publish(scene.message(queue, label, priority=priority))
        await scene.pass_time(scene.unit / 100)
    consumer = await scene.consume(queue)
    got = [await scene.take_one(consumer) for _ in range(5)]
    assert labels(got) == ["c9", "b5", "d5", "a0", "e0"]


@proves("C2")
@requires("priorities")
async def test_a_batch_takes_the_most_urgent(scene: Scene) -> None:
    """a receive of several has the highest priorities among them."""
    queue = await scene.queue()
    await scene.publish(*(scene.message(queue, f"m{priority}", priority=priority) for priority in range(10)))
    consumer = await scene.consume(queue)
    assert sorted(labels(await scene.take(consumer, 3))) == ["m7", "m8", "m9"]


@proves("C6")
@requires("priorities")
async def test_priority_survives_a_retry(scene: Scene) -> None:
    """a failed urgent message is still urgent."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "urgent", priority=9))
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    await scene.publish(scene.message(queue, "usual"))
    await scene.fail(consumer, delivery)
    assert labels([await scene.take_one(consumer)]) == ["urgent"]


@proves("C2")
@requires("priorities", "delay", "fifo")
async def test_ready_since_counts_not_published_since(scene: Scene) -> None:
    """of one priority the one that became ready first comes first, though published later."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "delayed", not_before=scene.now() + 2 * scene.unit))
    await scene.pass_time(scene.unit)
    await scene.publish(scene.message(queue, "direct"))
    await scene.pass_time(2 * scene.unit)
    consumer = await scene.consume(queue)
    assert labels([await scene.take_one(consumer), await scene.take_one(consumer)]) == ["direct", "delayed"]
