"""Retained events: late subscriptions and replay."""

from __future__ import annotations

from postroom.broker.base import Dead, Subscription
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


async def _all(scene: Scene, subscription: str, count: int) -> list[str]:
    """The labels of ``count`` messages, taken one by one, then there are no more: in their order, if it has one."""
    consumer = await scene.consume(subscription)
    got = []
    for _ in range(count):
        delivery = await scene.take_one(consumer)
        await scene.ack(consumer, delivery)
        got += labels([delivery])
    await scene.nothing(consumer)
    await consumer.close()
    return got if scene.harness.capabilities.fifo else sorted(got)


async def _publish_each(scene: Scene, topic: str, wanted: str) -> None:
    for message in scene.messages(topic, wanted):
        await scene.publish(message)
        await scene.pass_time(scene.unit / 20)


@proves("I25")
@requires("retention")
async def test_new_subscriber_receives_old_messages(scene: Scene) -> None:
    """from earliest: what is retained, in publish order, then what comes; the other subscriptions are undisturbed."""
    topic = await scene.topic(retention=1000 * scene.unit)
    early = await scene.subscribe(topic)
    await _publish_each(scene, topic, "a b c")
    late = await scene.subscribe(topic, start="earliest")
    await _publish_each(scene, topic, "d")
    assert await _all(scene, late, 4) == ["a", "b", "c", "d"]
    assert await _all(scene, early, 4) == ["a", "b", "c", "d"]


@proves("I25")
@requires("retention")
async def test_latest_gets_none_of_the_retained(scene: Scene) -> None:
    """retention alone gives a later subscription nothing."""
    topic = await scene.topic(retention=1000 * scene.unit)
    await _publish_each(scene, topic, "a")
    assert await scene.counts(await scene.subscribe(topic)) == {}


@proves("I25")
@requires("retention")
async def test_earliest_counts_once(scene: Scene) -> None:
    """declared again, it does not begin anew."""
    topic = await scene.topic(retention=1000 * scene.unit)
    await _publish_each(scene, topic, "a b")
    name = await scene.subscribe(topic, start="earliest")
    again = Subscription(name=name, pattern=topic, start="earliest")
    await scene.broker.declare([], [again])
    assert await _all(scene, name, 2) == ["a", "b"]
    await scene.broker.declare([], [again])
    assert await scene.counts(name) == {}


@proves("I25")
@requires("retention", "filters", "patterns")
async def test_earliest_respects_pattern_and_filter(scene: Scene) -> None:
    """only what the subscription would have got."""
    root = scene.name("order")
    paid = await scene.topic(f"{root}.paid", retention=1000 * scene.unit)
    other = await scene.topic(f"{root}.x.y", retention=1000 * scene.unit)
    for label, topic, region in (("yes", paid, "eu"), ("region", paid, "us"), ("topic", other, "eu")):
        await scene.publish(scene.message(topic, label, headers={"region": region}))
    name = await scene.subscribe(f"{root}.*", start="earliest", where={"region": "eu"})
    assert await _all(scene, name, 1) == ["yes"]


@proves("I25", "C15")
@requires("retention")
async def test_retention_ends(scene: Scene) -> None:
    """what is older than the retention is not there for the late; waiting copies are kept (I26)."""
    topic = await scene.topic(retention=4 * scene.unit)
    early = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "old"))
    await scene.pass_time(3 * scene.unit)
    await scene.publish(scene.message(topic, "young"))
    await scene.pass_time(2 * scene.unit)
    assert await _all(scene, await scene.subscribe(topic, start="earliest"), 1) == ["young"]
    assert await _all(scene, early, 2) == ["old", "young"]


@proves("I25")
@requires("retention")
async def test_without_retention_there_is_nothing_earlier(scene: Scene) -> None:
    """from earliest on a topic that retains nothing starts empty, and replays nothing."""
    topic = await scene.topic()
    await scene.publish(scene.message(topic))
    name = await scene.subscribe(topic, start="earliest")
    assert await scene.counts(name) == {}
    assert await scene.broker.replay(name) == 0


@proves("I25")
@requires("retention")
async def test_replay(scene: Scene) -> None:
    """the same messages again under their own ids, as attempt 1, in the same sequence each time, to this one only."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name, other = await scene.subscribe(topic), await scene.subscribe(topic)
    await _publish_each(scene, topic, "a b c")
    assert await _all(scene, name, 3) == ["a", "b", "c"]
    for _ in range(2):
        assert await scene.broker.replay(name) == 3
        assert await _all(scene, name, 3) == ["a", "b", "c"]
    assert await scene.counts(other) == {"ready": 3}


@proves("I25")
@requires("retention")
async def test_a_replayed_message_is_whole(scene: Scene) -> None:
    """id, body, headers and all, though its first copy was done and cleared."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name = await scene.subscribe(topic)
    sent = scene.message(topic, "whole", headers={"region": "eu"}, key="k")
    await scene.publish(sent)
    consumer = await scene.consume(name)
    await scene.fail(consumer, await scene.take_one(consumer))
    await scene.ack(consumer, await scene.take_one(consumer))
    assert await scene.broker.replay(name) == 1
    delivery = await scene.take_one(consumer)
    assert (delivery.message, delivery.attempt) == (sent, 1)


@proves("I25")
@requires("retention")
async def test_replay_after_the_records_are_forgotten(scene: Scene) -> None:
    """the retention of the topic decides, not that of the results."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "a", result_ttl=0.0))
    assert await _all(scene, name, 1) == ["a"]
    assert await scene.broker.replay(name) == 1
    assert await _all(scene, name, 1) == ["a"]


@proves("I25")
@requires("retention")
async def test_replay_since(scene: Scene) -> None:
    """only what was published since then."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "before"))
    await scene.pass_time(scene.unit)
    since = scene.now()
    await scene.pass_time(scene.unit)
    await scene.publish(scene.message(topic, "after"))
    await _all(scene, name, 2)
    assert await scene.broker.replay(name, since) == 1
    assert await _all(scene, name, 1) == ["after"]


@proves("I25", "I4")
@requires("retention", "known_ids")
async def test_replay_leaves_alone_what_is_still_to_be_done(scene: Scene) -> None:
    """what waits or runs is not doubled; what is dead or done comes again."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name = await scene.subscribe(topic)
    await _publish_each(scene, topic, "done dead running waiting")
    consumer = await scene.consume(name)
    await scene.ack(consumer, await scene.take_one(consumer))
    await scene.do(consumer, Dead(failure()), await scene.take_one(consumer))
    running = await scene.take_one(consumer)
    assert await scene.broker.replay(name) == 2
    assert await scene.counts(name) == {"ready": 3, "running": 1}
    await scene.ack(consumer, running)
    others = {"dead", "done", "running", "waiting"} - set(labels([running]))
    assert sorted(await _all(scene, name, 3)) == sorted(others)


@proves("I25", "I4")
@requires("retention", "known_ids")
async def test_what_was_suspect_is_replayed_as_any_other(scene: Scene) -> None:
    """its former life is over: it is no suspect any more, and purged it does not come."""
    topic = await scene.topic(retention=1000 * scene.unit)
    name = await scene.subscribe(topic)
    await scene.publish(scene.message(topic))
    frozen, consumer = await scene.consume(name), await scene.consume(name)
    await scene.kill(frozen, started=[await scene.take_one(frozen)])
    suspect = await scene.take_one(consumer)
    assert suspect.suspect
    await scene.ack(consumer, suspect)
    assert await scene.broker.replay(name) == 1
    again = await scene.take_one(consumer)
    assert (again.attempt, again.suspect) == (1, False)
    await scene.ack(consumer, again)
    assert await scene.broker.replay(name) == 1
    assert await scene.broker.purge(name) == 1
    await scene.nothing(consumer)
    assert await scene.counts(name) == {}


@proves("I25", "C11")
@requires("retention", "deduplication")
async def test_a_duplicate_is_retained_once(scene: Scene) -> None:
    """what was no second message is none in the history either."""
    topic = await scene.topic(retention=1000 * scene.unit)
    message = scene.message(topic, "once")
    await scene.publish(message)
    await scene.publish(message)
    await scene.publish(scene.message(topic, "key", idempotency_key="k"))
    await scene.publish(scene.message(topic, "key", idempotency_key="k"))
    assert sorted(await _all(scene, await scene.subscribe(topic, start="earliest"), 2)) == ["key", "once"]


@proves("I25")
@requires("retention", "durability")
async def test_retained_survives_a_restart(scene: Scene) -> None:
    """the history is as durable as the messages."""
    topic = await scene.topic(retention=1000 * scene.unit)
    await _publish_each(scene, topic, "a b")
    await scene.restart()
    assert await _all(scene, await scene.subscribe(topic, start="earliest"), 2) == ["a", "b"]
