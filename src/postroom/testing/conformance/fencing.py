"""Leases: who holds, who has lost, and what the death of a holder costs."""

from __future__ import annotations

import asyncio

from postroom.broker.base import Ack, Cancel, Dead, Delivery, Release, Retry
from postroom.errors import LeaseLost
from postroom.testing.checker import held_twice, miscounted
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


@proves("C4", "I6")
async def test_a_lease_that_ends_frees_the_message(scene: Scene) -> None:
    """what a frozen holder had started comes to another: as the next attempt, and suspect."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    delivery = await scene.take_one(frozen)
    await scene.kill(frozen, started=[delivery])
    again = await scene.take_one(other)
    assert (again.message, again.attempt, again.suspect) == (delivery.message, 2, True)
    await scene.ack(other, again)
    assert held_twice(scene.history, queue) == []


@proves("C7")
async def test_a_waiting_consumer_gets_what_a_lease_gives_free(scene: Scene) -> None:
    """a receive that began to wait before anything was claimed is woken when the lease of another ends."""
    queue = await scene.queue()
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.publish(scene.message(queue))
    await scene.take_one(frozen)
    waiting = asyncio.create_task(other.receive(1, None))
    await scene.pass_time(scene.lease / 2)
    assert not waiting.done()
    await scene.pass_time(scene.lease)
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["m"]


@proves("C7", "I10")
@requires("start_notes")
async def test_what_was_not_started_does_not_count(scene: Scene) -> None:
    """what a dead holder had only claimed comes back uncounted; only what it had started is suspect."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c"))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    deliveries = await scene.take(frozen, 3)
    await scene.kill(frozen, started=deliveries[:1])
    got = {delivery.message.id: (delivery.attempt, delivery.suspect) for delivery in await scene.take(other, 3)}
    assert got == {
        deliveries[0].message.id: (2, True),
        deliveries[1].message.id: (1, False),
        deliveries[2].message.id: (1, False),
    }


@proves("C7", "I11")
async def test_a_killer_does_not_loop(scene: Scene) -> None:
    """every death counts: the attempt rises each time and the history tells of it, so that the worker can give up."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "killer"))
    for attempt in (1, 2, 3, 4, 5):
        victim = await scene.consume(queue)
        delivery = await scene.take_one(victim)
        assert delivery.attempt == attempt
        await scene.kill(victim, started=[delivery])
    last = await scene.consume(queue)
    delivery = await scene.take_one(last)
    assert delivery.attempt == 6
    await scene.do(last, Dead(failure(6, "worker_lost")), delivery)
    (letter,) = await scene.broker.dead_letters(queue)
    assert [entry.reason for entry in letter.failures] == ["worker_lost"] * 6
    assert [entry.attempt for entry in letter.failures] == [1, 2, 3, 4, 5, 6]


@proves("C5", "I8")
async def test_a_frozen_holder_cannot_settle(scene: Scene) -> None:
    """whatever a holder says after its lease has passed to another is refused and changes nothing."""
    for outcome in (Ack(), Retry(delay=0.0, failure=failure()), Release(), Dead(failure()), Cancel()):
        queue = await scene.queue()
        await scene.publish(scene.message(queue))
        frozen, other = await scene.consume(queue), await scene.consume(queue)
        old = await scene.take_one(frozen)
        await scene.kill(frozen)
        new = await scene.take_one(other)
        error = await scene.try_settle(frozen, old, outcome)
        assert isinstance(error, LeaseLost), f"{outcome} by the old holder: {error!r}"
        assert await scene.counts(queue) == {"running": 1}
        await scene.ack(other, new)
        error = await scene.try_settle(frozen, old, outcome)
        assert isinstance(error, LeaseLost), f"{outcome} by the old holder, later: {error!r}"
        assert await scene.counts(queue) == {}


@proves("C5", "I8")
async def test_a_refusal_does_not_affect_the_batch(scene: Scene) -> None:
    """of one batch the lost are refused and the held are settled."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "lost"))
    consumer, other = await scene.consume(queue), await scene.consume(queue)
    lost = await scene.take_one(consumer)
    await scene.kill(consumer)
    await scene.take_one(other)
    await scene.publish(scene.message(queue, "held"))
    held = await scene.take_one(consumer)
    errors = await consumer.settle([(lost, Ack()), (held, Ack())])
    assert isinstance(errors[0], LeaseLost)
    assert errors[1] is None
    assert await scene.counts(queue) == {"running": 1}


@proves("C3", "I7")
async def test_extending_keeps_the_lease(scene: Scene) -> None:
    """a holder that extends keeps its message for five leases, and can then settle it."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    holder, other = await scene.consume(queue), await scene.consume(queue)
    delivery = await scene.take_one(holder)
    holder.started([delivery])
    for _ in range(10):
        await scene.pass_time(scene.lease / 2)
        assert await holder.extend([delivery]) == []
        await scene.nothing(other)
    await scene.ack(holder, delivery)


@proves("C3", "I7")
async def test_extending_gives_a_full_lease_from_now(scene: Scene) -> None:
    """an extension is no addition: the new lease ends one lease after it."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    holder, other = await scene.consume(queue), await scene.consume(queue)
    delivery = await scene.take_one(holder)
    await holder.extend([delivery])
    await holder.extend([delivery])
    await scene.kill(holder)
    await scene.take_one(other)


@proves("C5", "I7")
async def test_extend_tells_what_is_lost(scene: Scene) -> None:
    """extend returns those whose lease has passed to another, and renews the others."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "lost"))
    holder, other = await scene.consume(queue), await scene.consume(queue)
    lost = await scene.take_one(holder)
    await scene.kill(holder)
    successor = await scene.take_one(other)
    await scene.publish(scene.message(queue, "held"))
    held = await scene.take_one(holder)
    assert await holder.extend([lost, held]) == [lost]
    assert await other.extend([successor]) == []
    await scene.ack(other, successor)


@proves("C7", "I11b")
async def test_one_suspect_at_a_time(scene: Scene) -> None:
    """a consumer gets the next suspect only once it has settled the one it holds; others flow around them."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c"))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    claimed = await scene.take(frozen, 3)
    await scene.kill(frozen, started=claimed)
    await scene.publish(*scene.messages(queue, "x y"))
    suspects = set()
    for number in range(3):
        got: list[Delivery] = []
        while more := await scene.receive(other, 10, wait=not got):
            got += more
        found = [delivery for delivery in got if delivery.suspect]
        assert len(found) == 1, f"exactly one suspect at a time, not {labels(found)}"
        if number == 0:
            innocent = [delivery for delivery in got if not delivery.suspect]
            assert sorted(labels(innocent)) == ["x", "y"], "the others must flow around the suspects"
            await scene.ack(other, *innocent)
        await scene.nothing(other)
        suspects.update(labels(found))
        await scene.ack(other, *found)
    assert suspects == {"a", "b", "c"}


@proves("C7")
async def test_another_consumer_may_have_another_suspect(scene: Scene) -> None:
    """the bound is per consumer: two can clear up side by side."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b"))
    frozen, one, other = [await scene.consume(queue) for _ in range(3)]
    await scene.kill(frozen, started=await scene.take(frozen, 2))
    got = [await scene.take_one(one), await scene.take_one(other)]
    assert [delivery.suspect for delivery in got] == [True, True]


@proves("C7", "C4")
async def test_a_suspect_that_was_lost_is_no_longer_held(scene: Scene) -> None:
    """a consumer whose lease of a suspect has passed to others may be given suspects again: none is left to nobody."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    one, other = await scene.consume(queue), await scene.consume(queue)
    for attempt, consumer in enumerate((one, other, one, other, one), 1):
        delivery = await scene.take_one(consumer)
        assert (delivery.attempt, delivery.suspect) == (attempt, attempt > 1)
        await scene.kill(consumer, started=[delivery])


@proves("C7")
async def test_settling_a_suspect_wakes_its_consumer(scene: Scene) -> None:
    """a receive that waits, because its consumer holds a suspect, gets the next once that one is settled."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b"))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.kill(frozen, started=await scene.take(frozen, 2))
    first = await scene.take_one(other)
    waiting = asyncio.create_task(other.receive(1, None))
    await scene.settle()
    assert not waiting.done()
    await scene.ack(other, first)
    async with asyncio.timeout(scene.harness.patience):
        assert sorted(labels([first, *await waiting])) == ["a", "b"]


@proves("C7")
@requires("priorities")
async def test_a_suspect_has_its_priority(scene: Scene) -> None:
    """what came back from a dead holder does not overtake the more urgent."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "suspect", priority=1))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.kill(frozen, started=[await scene.take_one(frozen)])
    await scene.publish(scene.message(queue, "urgent", priority=5))
    assert labels([await scene.take_one(other), await scene.take_one(other)]) == ["urgent", "suspect"]


@proves("C7", "C2")
@requires("expiry")
async def test_an_expired_suspect_hides_no_other(scene: Scene) -> None:
    """of two that a dead holder had started one has expired since: the other is there at once."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "stale", expires_at=scene.now() + scene.lease / 2))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    started = await scene.take(frozen, 1)
    await scene.publish(scene.message(queue, "sound"))
    started += await scene.take(frozen, 1)
    await scene.kill(frozen, started=started)
    assert labels([await scene.take_one(other)]) == ["sound"]
    await scene.nothing(other)


@proves("C7")
async def test_suspicion_stays_as_long_as_told(scene: Scene) -> None:
    """a retry clears a suspect unless it says otherwise; a release leaves it as it is."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    assert not delivery.suspect
    await scene.do(consumer, Retry(delay=0.0, failure=failure(1, "worker_lost"), suspect=True), delivery)
    delivery = await scene.take_one(consumer)
    assert delivery.suspect
    await scene.do(consumer, Release(), delivery)
    delivery = await scene.take_one(consumer)
    assert (delivery.suspect, delivery.attempt) == (True, 2)
    await scene.fail(consumer, delivery)
    delivery = await scene.take_one(consumer)
    assert (delivery.suspect, delivery.attempt) == (False, 3)
    assert miscounted(scene.history, queue) == []


@proves("C4")
@requires("fifo")
async def test_the_recovered_goes_ahead(scene: Scene) -> None:
    """what a dead holder had held comes before what waited."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "first"))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.take_one(frozen)
    await scene.publish(*scene.messages(queue, "a b"))
    await scene.kill(frozen)
    assert labels(await scene.take(other)) == ["first"]
