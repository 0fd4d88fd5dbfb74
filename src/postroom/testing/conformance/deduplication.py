"""Idempotency keys: one key in its window is one message."""

from __future__ import annotations

import asyncio

from postroom.errors import IdempotencyConflict, QueueFull
from postroom.message import Message
from postroom.testing.scene import Scene, labels
from postroom.testing.suite import proves, requires


@proves("C11", "I17")
@requires("deduplication")
async def test_one_key_one_message(scene: Scene) -> None:
    """many concurrent publishes with one key make one message, and all callers get its id."""
    queue = await scene.queue()
    sent = [scene.message(queue, "same", idempotency_key="k") for _ in range(20)]
    brokers = [scene.broker, await scene.another_broker()]
    answers = await asyncio.gather(*(brokers[n % 2].publish([message]) for n, message in enumerate(sent)))
    ids = {answer for (answer,) in answers}
    assert len(ids) == 1, answers
    consumer = await scene.consume(queue)
    got = await scene.receive(consumer, 20)
    assert [delivery.message.id for delivery in got] == list(ids)
    await scene.nothing(consumer)


@proves("C11", "I17")
@requires("deduplication")
async def test_one_key_within_a_batch(scene: Scene) -> None:
    """the same for messages of one batch."""
    queue = await scene.queue()
    first, second, other = (scene.message(queue, "same", idempotency_key=key) for key in ("k", "k", "other"))
    assert await scene.broker.publish([first, second, other]) == [first.id, first.id, other.id]
    assert await scene.counts(queue) == {"ready": 2}


@proves("C11", "I17")
@requires("deduplication")
async def test_a_key_is_remembered_after_the_end(scene: Scene) -> None:
    """done is done: the key still leads to the first message, whether it succeeded or even if nothing is kept of it."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    for number, keep in enumerate((86_400.0, 0.0)):
        options = {"idempotency_key": f"k{number}", "result_ttl": keep}
        first = scene.message(queue, "same", **options)
        await scene.publish(first)
        await scene.ack(consumer, await scene.take_one(consumer))
        assert await scene.publish(scene.message(queue, "same", **options)) == [first.id]
        await scene.nothing(consumer)


@proves("C11", "I17")
@requires("deduplication")
async def test_after_the_window_it_is_a_new_message(scene: Scene) -> None:
    """the window is counted from the first message; later ones do not prolong it."""
    queue = await scene.queue()

    def message() -> Message:
        return scene.message(queue, "same", idempotency_key="k", dedup_window=3 * scene.unit)

    first = message()
    await scene.publish(first)
    await scene.pass_time(2 * scene.unit)
    assert await scene.publish(message()) == [first.id]
    await scene.pass_time(2 * scene.unit)
    second = message()
    assert await scene.publish(second) == [second.id]
    assert await scene.publish(message()) == [second.id]
    assert await scene.counts(queue) == {"ready": 2}


@proves("C11", "I17")
@requires("deduplication")
async def test_another_payload_is_a_conflict(scene: Scene) -> None:
    """the same key with another name or body is an error, and nothing is stored."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue, "same", idempotency_key="k"))
    for other in (
        scene.message(queue, "other", idempotency_key="k"),
        scene.message(queue, "same", name="other", idempotency_key="k"),
    ):
        assert isinstance(await scene.refused(other), IdempotencyConflict)
    assert await scene.counts(queue) == {"ready": 1}


@proves("C11", "I17")
@requires("deduplication")
async def test_headers_do_not_matter(scene: Scene) -> None:
    """only name and body make the payload: another trace or priority is the same call."""
    queue = await scene.queue()
    first = scene.message(queue, "same", idempotency_key="k", headers={"trace": "1"})
    await scene.publish(first)
    again = scene.message(queue, "same", idempotency_key="k", headers={"trace": "2"}, priority=3)
    assert await scene.publish(again) == [first.id]


@proves("C11", "I17")
@requires("deduplication")
async def test_keys_of_different_topics_differ(scene: Scene) -> None:
    """a key belongs to its topic; no key is no key."""
    one, other = await scene.queue(), await scene.queue()
    await scene.publish(scene.message(one, "a", idempotency_key="k"), scene.message(other, "b", idempotency_key="k"))
    await scene.publish(scene.message(one, "a"), scene.message(one, "a"))
    assert await scene.counts(one) == {"ready": 3}
    assert await scene.counts(other) == {"ready": 1}


@proves("C11", "C15")
@requires("deduplication", "limits")
async def test_a_refused_message_takes_no_key(scene: Scene) -> None:
    """what was not stored is not remembered: the same call succeeds once there is room."""
    queue = await scene.queue(limit=1)
    await scene.publish(scene.message(queue, "first"))
    message = scene.message(queue, "second", idempotency_key="k")
    assert isinstance(await scene.refused(message), QueueFull)
    consumer = await scene.consume(queue)
    await scene.ack(consumer, await scene.take_one(consumer))
    assert await scene.publish(message) == [message.id]
    assert labels(await scene.take(consumer)) == ["second"]


@proves("C11", "I17")
@requires("deduplication", "durability")
async def test_keys_survive_a_restart(scene: Scene) -> None:
    """the same key after a restart is still the first message."""
    queue = await scene.queue()
    first = scene.message(queue, "same", idempotency_key="k")
    await scene.publish(first)
    await scene.restart()
    assert await scene.publish(scene.message(queue, "same", idempotency_key="k")) == [first.id]
    assert await scene.counts(queue) == {"ready": 1}
