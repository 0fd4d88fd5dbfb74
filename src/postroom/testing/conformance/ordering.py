"""Order: by key where asked for; one key never holds up another."""

from __future__ import annotations

import asyncio

import msgspec

from postroom.broker.base import Ack, Cancel, Dead, Release, Retry
from postroom.testing.checker import out_of_order
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


@proves("C14")
@requires("fifo")
async def test_publish_subscribe_in_order(scene: Scene) -> None:
    """without priorities, delays and failures the longer ready come first."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    for label in ["a", "b", "c", "d", "e"]:
        await scene.publish(scene.message(queue, label))
        await scene.pass_time(scene.unit / 100)
    got = [await scene.take_one(consumer) for _ in range(5)]
    assert labels(got) == ["a", "b", "c", "d", "e"]


@proves("C14", "I22")
@requires("ordering")
async def test_one_of_a_key_at_a_time(scene: Scene) -> None:
    """the next of a key comes only when the one before is settled, to whichever consumer."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b c", key="k"))
    one, other = await scene.consume(queue), await scene.consume(queue)
    for consumer, rival, label in ((one, other, "a"), (other, one, "b"), (one, other, "c")):
        delivery = await scene.take_one(consumer)
        assert labels([delivery]) == [label]
        await scene.nothing(rival)
        await scene.nothing(consumer)
        await scene.ack(consumer, delivery)
    assert out_of_order(scene.history, queue) == []


@proves("C14", "I22")
@requires("ordering")
async def test_an_ack_among_retries_lets_its_key_go_on(scene: Scene) -> None:
    """acks and failures of one batch are each answered, and after the ack the next of its key comes."""
    queue = await scene.queue(ordered=True)
    await scene.publish(
        scene.message(queue, "x1", key="x"), scene.message(queue, "x2", key="x"), scene.message(queue, "y1", key="y")
    )
    consumer = await scene.consume(queue)
    x1, y1 = sorted(await scene.take(consumer, 2), key=lambda delivery: labels([delivery]))
    retry = Retry(delay=0.0, failure=failure())
    assert await consumer.settle([(x1, Ack()), (y1, retry)]) == [None, None]
    assert sorted(labels(await scene.take(consumer, 2))) == ["x2", "y1"]


@proves("C14", "I22")
@requires("ordering")
async def test_keys_do_not_wait_for_each_other(scene: Scene) -> None:
    """of each key the first is ready at once; messages without a key have no order and wait for nobody."""
    queue = await scene.queue(ordered=True)
    await scene.publish(
        scene.message(queue, "x1", key="x"),
        scene.message(queue, "x2", key="x"),
        scene.message(queue, "y1", key="y"),
        scene.message(queue, "free1"),
        scene.message(queue, "free2"),
    )
    consumer = await scene.consume(queue)
    assert sorted(labels(await scene.take(consumer, 4))) == ["free1", "free2", "x1", "y1"]
    await scene.nothing(consumer)
    if scene.harness.capabilities.exact_stats:
        assert await scene.counts(queue) == {"running": 4, "delayed": 1}


@proves("C14", "I22")
@requires("ordering")
async def test_a_retry_holds_back_its_own_key_only(scene: Scene) -> None:
    """while a failed one waits, the later of its key wait behind it and others flow."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "x1 x2", key="x"), *scene.messages(queue, "y1 y2", key="y"))
    consumer = await scene.consume(queue)
    x1, y1 = sorted(await scene.take(consumer, 2), key=lambda delivery: delivery.message.body)
    await scene.fail(consumer, x1, delay=scene.unit)
    await scene.ack(consumer, y1)
    y2 = await scene.take_one(consumer)
    assert labels([y2]) == ["y2"]
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    x1 = await scene.take_one(consumer)
    assert (labels([x1]), x1.attempt) == (["x1"], 2)
    await scene.ack(consumer, x1, y2)
    assert labels([await scene.take_one(consumer)]) == ["x2"]
    assert out_of_order(scene.history, queue) == []


@proves("C14", "I22")
@requires("ordering")
async def test_a_release_keeps_the_order(scene: Scene) -> None:
    """what is given back is still the next of its key."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b", key="k"))
    consumer = await scene.consume(queue)
    await scene.do(consumer, Release(), await scene.take_one(consumer))
    first = await scene.take_one(consumer)
    await scene.do(consumer, Release(delay=scene.unit), first)
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    for label in ("a", "b"):
        delivery = await scene.take_one(consumer)
        assert labels([delivery]) == [label]
        await scene.ack(consumer, delivery)


@proves("C14", "I22")
@requires("ordering")
async def test_a_lost_lease_keeps_the_order(scene: Scene) -> None:
    """what a dead holder had is still the next of its key."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b", key="k"))
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.kill(frozen, started=[await scene.take_one(frozen)])
    for label in ("a", "b"):
        delivery = await scene.take_one(other)
        assert labels([delivery]) == [label]
        await scene.nothing(other)
        await scene.ack(other, delivery)


@proves("C14", "I22")
@requires("ordering")
async def test_every_end_frees_the_key(scene: Scene) -> None:
    """dead-lettering, cancelling and acking let the next one go."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b c d", key="k"))
    consumer = await scene.consume(queue)
    await scene.do(consumer, Dead(failure()), await scene.take_one(consumer))
    await scene.do(consumer, Cancel(), await scene.take_one(consumer))
    await scene.ack(consumer, await scene.take_one(consumer))
    assert labels([await scene.take_one(consumer)]) == ["d"]


@proves("C14", "I22")
@requires("ordering")
async def test_a_freed_key_wakes_the_waiting(scene: Scene) -> None:
    """a consumer that waits gets the next of a key as soon as another settles the one before."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b", key="k"))
    one, other = await scene.consume(queue), await scene.consume(queue)
    first = await scene.take_one(one)
    waiting = asyncio.create_task(other.receive(1, None))
    await scene.settle()
    assert not waiting.done()
    await scene.ack(one, first)
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["b"]


@proves("C14", "I22")
@requires("ordering", "delay")
async def test_a_delayed_message_holds_its_place(scene: Scene) -> None:
    """publish order is the order, also if the first of a key has yet to wait for its time."""
    queue = await scene.queue(ordered=True)
    await scene.publish(
        scene.message(queue, "later", key="k", not_before=scene.now() + scene.unit),
        scene.message(queue, "behind", key="k"),
    )
    consumer = await scene.consume(queue)
    await scene.nothing(consumer)
    await scene.pass_time(scene.unit)
    for label in ("later", "behind"):
        delivery = await scene.take_one(consumer)
        assert labels([delivery]) == [label]
        await scene.ack(consumer, delivery)


@proves("C14", "I22")
@requires("ordering", "expiry")
async def test_expiry_frees_the_key(scene: Scene) -> None:
    """an expired message lets those behind it go."""
    queue = await scene.queue(ordered=True)
    first, second, third = scene.messages(queue, "a b c", key="k")
    second = msgspec.structs.replace(second, expires_at=scene.now() + scene.unit)
    await scene.publish(first, second, third)
    consumer = await scene.consume(queue, lease=scene.unit * 20)
    running = await scene.take_one(consumer)
    await scene.pass_time(scene.unit * 1.5)
    await scene.ack(consumer, running)
    assert labels([await scene.take_one(consumer)]) == ["c"]


@proves("C14")
@requires("ordering")
async def test_a_redriven_message_waits_for_its_key(scene: Scene) -> None:
    """never two of one key at once, also when one comes back from the dead letters."""
    queue = await scene.queue(ordered=True)
    first, second = scene.messages(queue, "a b", key="k")
    await scene.publish(first, second)
    consumer = await scene.consume(queue)
    await scene.do(consumer, Dead(failure()), await scene.take_one(consumer))
    running = await scene.take_one(consumer)
    assert labels([running]) == ["b"]
    await scene.broker.redrive(queue, [first.id])
    await scene.nothing(consumer)
    await scene.ack(consumer, running)
    assert labels([await scene.take_one(consumer)]) == ["a"]


@proves("C14")
@requires("ordering")
async def test_purge_frees_the_keys(scene: Scene) -> None:
    """after a purge the keys are free for what comes."""
    queue = await scene.queue(ordered=True)
    await scene.publish(*scene.messages(queue, "a b", key="k"))
    assert await scene.broker.purge(queue) == 2
    await scene.publish(scene.message(queue, "c", key="k"))
    assert labels(await scene.take(await scene.consume(queue))) == ["c"]


@proves("C14")
async def test_keys_mean_nothing_where_no_order_is_asked_for(scene: Scene) -> None:
    """in a subscription that is not ordered, messages of one key run beside each other."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b", key="k"))
    assert len(await scene.take(await scene.consume(queue), 2)) == 2


@proves("C14", "I22")
@requires("ordering")
async def test_order_under_failures(scene: Scene) -> None:
    """many keys, many consumers, some failing and some giving back: per key everything stays in order."""
    queue = await scene.queue(ordered=True)
    for number in range(8):
        await scene.publish(*(scene.message(queue, f"{key}{number}", key=key) for key in "pqrst"))
    consumers = [await scene.consume(queue) for _ in range(3)]
    done: list[str] = []
    for turn in range(2000):
        if len(done) == 40:
            break
        consumer = consumers[turn % 3]
        for delivery in await scene.receive(consumer, 2, wait=False):
            if (turn + delivery.attempt) % 4 == 0:
                await scene.fail(consumer, delivery)
            elif turn % 5 == 0:
                await scene.do(consumer, Release(), delivery)
            else:
                await scene.ack(consumer, delivery)
                done += labels([delivery])
    for key in "pqrst":
        assert [label for label in done if label[0] == key] == [f"{key}{number}" for number in range(8)]
    assert out_of_order(scene.history, queue) == []
