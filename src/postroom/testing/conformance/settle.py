"""What settle promises: once, by the holder, each for itself."""

from __future__ import annotations

from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry
from postroom.errors import AlreadySettled
from postroom.testing.checker import miscounted, resurrected, total_queue
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


@proves("I4")
async def test_ack_is_final(scene: Scene) -> None:
    """what was acked never comes again: not after the lease, not for another, not after a new connection."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    await scene.ack(consumer, await scene.take_one(consumer))
    await scene.pass_time(scene.lease * 2)
    await scene.nothing(consumer)
    await consumer.close()
    await scene.nothing(await scene.consume(queue, broker=await scene.another_broker()))
    assert await scene.counts(queue) == {}


@proves("I5")
async def test_resend_on_error(scene: Scene) -> None:
    """of a hundred messages two fail at first; all hundred arrive."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, " ".join(f"m{n}" for n in range(100))))
    consumer = await scene.consume(queue)
    deliveries = await scene.take(consumer, 100)
    for delivery in deliveries[:2]:
        await scene.fail(consumer, delivery)
    await scene.ack(consumer, *deliveries[2:])
    again = await scene.take(consumer, 2)
    assert sorted(labels(again)) == sorted(labels(deliveries[:2]))
    await scene.ack(consumer, *again)
    found = total_queue(scene.history, queue)
    assert (found.lost, found.unexpected, found.unexplained, found.duplicated) == ([], [], [], 2)


@proves("I10")
async def test_a_retry_counts(scene: Scene) -> None:
    """each retry raises the attempt by one."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    for attempt in (1, 2, 3, 4):
        delivery = await scene.take_one(consumer)
        assert delivery.attempt == attempt
        assert not delivery.suspect
        await scene.fail(consumer, delivery)
    assert miscounted(scene.history, queue) == []


@proves("I10")
async def test_a_release_does_not_count(scene: Scene) -> None:
    """a released message comes again as the same attempt, however often."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    await scene.fail(consumer, await scene.take_one(consumer))
    for _ in range(7):
        delivery = await scene.take_one(consumer)
        assert delivery.attempt == 2
        consumer.started([delivery])
        await scene.do(consumer, Release(), delivery)
    assert miscounted(scene.history, queue) == []


@proves("C16")
@requires("fifo")
async def test_the_released_goes_ahead(scene: Scene) -> None:
    """what is given back at once comes before what waits."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c"))
    consumer = await scene.consume(queue)
    first = await scene.take_one(consumer)
    await scene.do(consumer, Release(), first)
    assert labels([await scene.take_one(consumer)]) == labels([first])


@proves("C6")
@requires("fifo")
async def test_the_retried_goes_behind(scene: Scene) -> None:
    """what failed is tried again after what was ready before."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b"))
    consumer = await scene.consume(queue)
    await scene.pass_time(scene.unit)
    await scene.fail(consumer, await scene.take_one(consumer))
    assert labels(await scene.take(consumer) + await scene.take(consumer)) == ["b", "a"]


@proves("I4")
async def test_settled_once(scene: Scene) -> None:
    """a second settlement is refused as AlreadySettled, whatever the outcomes, and the first stands."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    outcomes: list[Outcome] = [Ack(), Retry(delay=0.0, failure=failure()), Release(), Dead(failure()), Cancel()]
    for second in outcomes:
        await scene.publish(scene.message(queue))
        delivery = await scene.take_one(consumer)
        await scene.ack(consumer, delivery)
        assert isinstance(await scene.try_settle(consumer, delivery, second), AlreadySettled)
        await scene.nothing(consumer)
    assert await scene.broker.dead_letters(queue) == []


@proves("I4")
async def test_settled_twice_in_one_batch(scene: Scene) -> None:
    """the same within one batch: the first of the two stands."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    first, second = await consumer.settle([(delivery, Ack()), (delivery, Dead(failure()))])
    assert first is None
    assert isinstance(second, AlreadySettled)
    assert await scene.counts(queue) == {}


@proves("I4")
async def test_a_retry_settled_twice(scene: Scene) -> None:
    """an old delivery stays settled though its message is back: also while the same consumer holds it again."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    old = await scene.take_one(consumer)
    await scene.fail(consumer, old)
    assert isinstance(await scene.try_settle(consumer, old, Ack()), AlreadySettled)
    new = await scene.take_one(consumer)
    assert isinstance(await scene.try_settle(consumer, old, Ack()), AlreadySettled)
    assert await scene.counts(queue) == {"running": 1}
    await scene.ack(consumer, new)


@proves("C1")
async def test_outcomes_of_a_batch_are_independent(scene: Scene) -> None:
    """one batch with every outcome and a refusal among them does each for itself, in order."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c d e f"))
    consumer = await scene.consume(queue)
    a, b, c, d, e, f = await scene.take(consumer, 6)
    await scene.ack(consumer, a)
    answers = await consumer.settle(
        [
            (b, Retry(delay=0.0, failure=failure())),
            (a, Ack()),
            (c, Release()),
            (d, Dead(failure())),
            (e, Cancel()),
            (f, Ack()),
        ]
    )
    assert [answer is None for answer in answers] == [True, False, True, True, True, True]
    assert isinstance(answers[1], AlreadySettled)
    assert await scene.counts(queue) == {"ready": 2, "dead": 1}
    assert {delivery.message.id: delivery.attempt for delivery in await scene.take(consumer, 2)} == {
        b.message.id: 2,
        c.message.id: 1,
    }


@proves("I4")
async def test_settling_nothing_is_fine(scene: Scene) -> None:
    """empty batches have empty answers."""
    consumer = await scene.consume(await scene.queue())
    assert await consumer.settle([]) == []
    assert await consumer.extend([]) == []
    consumer.started([])


@proves("I31")
async def test_cancel_ends_a_message(scene: Scene) -> None:
    """a message settled as cancelled never comes again and is no dead letter."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    await scene.do(consumer, Cancel(), await scene.take_one(consumer))
    await scene.pass_time(scene.lease * 2)
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {}
    assert resurrected(scene.history, queue) == []
