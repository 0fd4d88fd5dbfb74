"""What publish promises: confirmed means stored, refused means told."""

from __future__ import annotations

import asyncio

import pytest

from postroom.broker.base import Dead, Subscription
from postroom.errors import QueueFull, TopicNotFound, UnsupportedOperation
from postroom.message import new_id
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires, supports


@proves("C1", "I1", "I2")
async def test_publish_subscribe(scene: Scene) -> None:
    """a hundred messages arrive once each, bytes and metadata unchanged."""
    queue = await scene.queue()
    sent = [
        scene.message(queue, f"m{number}", name=f"task-{number}", headers={"Number": f"N{number}"})
        for number in range(100)
    ]
    assert await scene.publish(*sent) == [message.id for message in sent], "without dedup the id is the message's own"
    consumer = await scene.consume(queue)
    got = await scene.take(consumer, 100)
    came = {delivery.message.id: delivery.message for delivery in got}
    for message in sent:
        # One by one: what pytest tells of a hundred that differ takes it half a minute to find.
        assert came.get(message.id) == message
    await scene.ack(consumer, *got)
    await scene.nothing(consumer)


@proves("C1", "I2")
async def test_every_field_survives(scene: Scene) -> None:
    """a message comes out exactly as it went in, every field of it."""
    queue = await scene.queue()
    sent = scene.message(
        queue,
        "all",
        name="invoices.send",
        headers={"traceparent": "00-abc", "region": "eu"},
        key="customer-7",
        created_at=scene.now() - 5.25,
        idempotency_key="order-42",
        result_ttl=4321.0,
    )
    await scene.publish(sent)
    assert (await scene.take_one(await scene.consume(queue))).message == sent


@proves("C1")
async def test_answers_are_in_order(scene: Scene) -> None:
    """in a batch each message has its own answer, and one refusal does not concern the others."""
    queue = await scene.queue()
    good, other = scene.messages(queue, "good other")
    bad = scene.message(scene.name("nowhere"), "bad")
    answers = await scene.broker.publish([good, bad, other])
    assert [answers[0], answers[2]] == [good.id, other.id]
    assert isinstance(answers[1], TopicNotFound)
    assert sorted(labels(await scene.take(await scene.consume(queue), 2))) == ["good", "other"]


@proves("C1")
async def test_publishing_nothing_is_fine(scene: Scene) -> None:
    """an empty batch has no answers."""
    await scene.queue()
    assert await scene.broker.publish([]) == []


@proves("I16")
async def test_unknown_topic_is_refused(scene: Scene) -> None:
    """a topic that nobody declared is an error, not a silent drop."""
    error = await scene.refused(scene.message(scene.name("nowhere")))
    assert isinstance(error, TopicNotFound), error


@proves("C1")
async def test_a_topic_nobody_subscribes_to_accepts(scene: Scene) -> None:
    """an event that nobody wants is accepted; a later subscription does not get it."""
    topic = await scene.topic()
    await scene.publish(scene.message(topic, "unwanted"))
    late = await scene.subscribe(topic)
    await scene.publish(scene.message(topic, "wanted"))
    consumer = await scene.consume(late)
    assert labels(await scene.take(consumer)) == ["wanted"]
    await scene.nothing(consumer)


@proves("I16", "C15")
@requires("limits")
async def test_a_full_queue_refuses(scene: Scene) -> None:
    """at the limit each further message is refused; settling makes room; dead letters take none."""
    queue = await scene.queue(limit=2)
    await scene.publish(*scene.messages(queue, "a b"))
    assert isinstance(await scene.refused(scene.message(queue, "c")), QueueFull)
    consumer = await scene.consume(queue)
    first, second = await scene.take(consumer, 2)
    assert isinstance(await scene.refused(scene.message(queue, "d")), QueueFull), "what runs is unsettled, too"
    await scene.ack(consumer, first)
    await scene.publish(scene.message(queue, "e"))
    await scene.do(consumer, Dead(failure()), second)
    await scene.publish(scene.message(queue, "f"))
    assert isinstance(await scene.refused(scene.message(queue, "h")), QueueFull)


@proves("I16")
@requires("limits")
async def test_a_full_queue_refuses_within_a_batch(scene: Scene) -> None:
    """a batch that does not fit is stored as far as it fits, and the answers tell how far."""
    queue = await scene.queue(limit=3)
    answers = await scene.broker.publish(scene.messages(queue, "a b c d e"))
    assert [isinstance(answer, str) for answer in answers] == [True, True, True, False, False], answers
    assert sorted(labels(await scene.take(await scene.consume(queue), 3))) == ["a", "b", "c"]


@proves("I16")
@requires("limits")
async def test_a_raised_limit_applies_to_later_messages(scene: Scene) -> None:
    """a subscription declared anew with a higher limit takes more, and has lost nothing."""
    topic = await scene.topic()
    name = await scene.subscribe(topic, limit=1)
    await scene.publish(scene.message(topic, "a"))
    assert isinstance(await scene.refused(scene.message(topic, "b")), QueueFull)
    await scene.broker.declare([], [Subscription(name=name, pattern=topic, limit=2)])
    await scene.publish(scene.message(topic, "c"))
    assert sorted(labels(await scene.take(await scene.consume(name), 2))) == ["a", "c"]


@proves("I3")
@requires("known_ids")
async def test_the_same_id_again_is_no_second_message(scene: Scene) -> None:
    """whoever retries an unconfirmed publish makes no duplicate: waiting, running or remembered."""
    queue = await scene.queue()
    message = scene.message(queue, "once")
    consumer = await scene.consume(queue)
    assert await scene.publish(message) == await scene.publish(message) == [message.id]
    delivery = await scene.take_one(consumer)
    await scene.publish(message)
    await scene.nothing(consumer)
    await scene.ack(consumer, delivery)
    await scene.publish(message)
    await scene.nothing(consumer)


@proves("I3")
@requires("known_ids")
async def test_the_same_id_twice_in_a_batch_is_one_message(scene: Scene) -> None:
    """the same within one batch."""
    queue = await scene.queue()
    message = scene.message(queue, "once")
    await scene.publish(message, message)
    consumer = await scene.consume(queue)
    await scene.ack(consumer, await scene.take_one(consumer))
    await scene.nothing(consumer)


@proves("I16")
async def test_a_batch_published_by_many_at_once(scene: Scene) -> None:
    """concurrent batches of one broker do not mix up their answers."""
    queue = await scene.queue()
    batches = [scene.messages(queue, f"a{n} b{n} c{n}") for n in range(20)]
    answers = await asyncio.gather(*(scene.broker.publish(batch) for batch in batches))
    assert answers == [[message.id for message in batch] for batch in batches]


@proves("C18")
async def test_what_is_not_supported_is_refused(scene: Scene) -> None:
    """an operation the broker declares it lacks raises UnsupportedOperation that names the capability."""
    capabilities = scene.harness.capabilities
    topic = await scene.topic()
    name = await scene.subscribe(topic)
    if not supports(capabilities, "transactional_publish"):
        with pytest.raises(UnsupportedOperation) as refusal:
            scene.broker.publish_in(object(), [scene.message(topic)])
        assert refusal.value.capability == "transactional_publish"
    if not supports(capabilities, "retention"):
        with pytest.raises(UnsupportedOperation) as refusal:
            await scene.broker.replay(name)
        assert refusal.value.capability == "retention"
    if not supports(capabilities, "jobs"):
        with pytest.raises(UnsupportedOperation) as refusal:
            await scene.broker.jobs.get(new_id())
        assert refusal.value.capability == "jobs"


@proves("C1", "I15")
@requires("durability")
async def test_what_is_confirmed_survives_a_restart(scene: Scene) -> None:
    """waiting, failed and dead messages are there after a restart, with all that is known of them."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    await scene.publish(*scene.messages(queue, "failed dead"))
    failed, dead = sorted(await scene.take(consumer, 2), key=lambda delivery: delivery.message.body, reverse=True)
    await scene.fail(consumer, failed)
    await scene.do(consumer, Dead(failure(text="for good")), dead)
    await scene.publish(scene.message(queue, "waiting"))
    await scene.restart()
    got = await scene.take(await scene.consume(queue), 2)
    assert {(label, delivery.attempt) for label, delivery in zip(labels(got), got, strict=True)} == {
        ("failed", 2),
        ("waiting", 1),
    }
    (letter,) = await scene.broker.dead_letters(queue)
    assert letter.message == dead.message
    assert [entry.message for entry in letter.failures] == ["for good"]
