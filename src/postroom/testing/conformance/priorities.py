"""Messages of different priority wait, die and are counted together: they are of one queue."""

from __future__ import annotations

from postroom.broker.base import Dead, Delivery
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires

_LEVELS = (0, 9, 5)


async def _publish_each(scene: Scene, queue: str) -> None:
    for level in _LEVELS:
        await scene.publish(scene.message(queue, f"m{level}", priority=level))


@proves("C8", "I14")
@requires("priorities")
async def test_dead_letters_of_every_priority(scene: Scene) -> None:
    """they are listed together, oldest death first, in pages; redriven they have their priority."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    await _publish_each(scene, queue)
    taken = {delivery.message.priority: delivery for delivery in await scene.take(consumer, 3)}
    for level in _LEVELS:
        await scene.do(consumer, Dead(failure()), taken[level])
        await scene.pass_time(scene.unit / 100)
    letters = await scene.broker.dead_letters(queue)
    assert [(letter.subscription, letter.message.topic, letter.message.priority) for letter in letters] == [
        (queue, queue, level) for level in _LEVELS
    ]
    pages = [await scene.broker.dead_letters(queue, limit=2, after=after) for after in (None, letters[1].message.id)]
    assert [labels(page) for page in pages] == [["m0", "m9"], ["m5"]]
    named = [letters[2].message.id, letters[0].message.id]
    assert sorted(labels(await scene.broker.dead_letters(queue, ids=named))) == ["m0", "m5"]
    assert await scene.broker.discard(queue, [letters[2].message.id]) == [letters[2].message.id]
    ids = [letter.message.id for letter in letters]
    assert sorted(await scene.broker.redrive(queue, ids)) == sorted(ids[:2])
    assert _as_sent(await scene.take(consumer, 2), queue) == {("m9", 9), ("m0", 0)}


@proves("C15", "I13")
@requires("priorities")
async def test_counts_and_purge_take_every_priority(scene: Scene) -> None:
    """the numbers of a queue, and a purge, are of all that waits in it; deleted, it is gone as a whole."""
    queue = await scene.queue()
    await _publish_each(scene, queue)
    assert await scene.counts(queue) == {"ready": 3}
    assert await scene.broker.purge(queue) == 3
    assert await scene.counts(queue) == {}
    await _publish_each(scene, queue)
    consumer = await scene.consume(queue)
    deliveries = await scene.take(consumer, 3)
    assert _as_sent(deliveries, queue) == {("m0", 0), ("m5", 5), ("m9", 9)}
    await scene.ack(consumer, *deliveries)
    await consumer.close()
    await scene.broker.unsubscribe(queue)
    assert not [stats for stats in await scene.broker.stats() if queue in stats.name]


def _as_sent(deliveries: list[Delivery], queue: str) -> set[tuple[str, int]]:
    assert {(delivery.subscription, delivery.message.topic) for delivery in deliveries} == {(queue, queue)}
    return {(delivery.message.body.decode(), delivery.message.priority) for delivery in deliveries}
