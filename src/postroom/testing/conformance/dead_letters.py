"""Dead letters: kept whole, listed, redriven, discarded."""

from __future__ import annotations

import asyncio

from postroom.broker.base import Dead, Retry
from postroom.message import JobState, new_id
from postroom.testing.checker import miscounted, resurrected
from postroom.testing.scene import Scene, failure, labels
from postroom.testing.suite import proves, requires


@proves("C8", "I12")
async def test_a_dead_letter_is_complete(scene: Scene) -> None:
    """it has the message as it was, where it was, when it died, and every failure in full."""
    topic = await scene.topic()
    name = await scene.subscribe(topic)
    sent = scene.message(topic, "letter", headers={"region": "eu"}, key="k", name="order.paid")
    await scene.publish(sent)
    consumer = await scene.consume(name)
    failures = []
    for attempt in (1, 2, 3, 4):
        failures.append(failure(attempt, text=f"failure {attempt}"))
        delivery = await scene.take_one(consumer)
        await scene.do(consumer, Retry(delay=0.0, failure=failures[-1]), delivery)
    failures.append(failure(5, "timeout", text="failure 5"))
    await scene.do(consumer, Dead(failures[-1]), await scene.take_one(consumer))
    (letter,) = await scene.broker.dead_letters(name)
    assert letter.message == sent
    assert letter.subscription == name
    assert list(letter.failures) == failures
    assert letter.redriven == 0
    assert abs(letter.dead_at - scene.now()) <= scene.harness.patience


@proves("C8", "I11")
async def test_the_dead_are_not_delivered(scene: Scene) -> None:
    """a dead letter comes to nobody, and does not expire."""
    queue = await scene.queue()
    await scene.bury(queue, scene.message(queue, "dead", result_ttl=scene.unit))
    consumer = await scene.consume(queue)
    await scene.pass_time(scene.lease * 2)
    await scene.nothing(consumer)
    assert labels(await scene.broker.dead_letters(queue)) == ["dead"]
    assert await scene.counts(queue) == {"dead": 1}


@proves("C8")
async def test_dead_letters_in_pages(scene: Scene) -> None:
    """oldest death first; a page follows the id after which it was asked for."""
    queue = await scene.queue()
    await scene.bury(queue, *scene.messages(queue, "a b c d e"))
    first = await scene.broker.dead_letters(queue, limit=2)
    second = await scene.broker.dead_letters(queue, limit=2, after=first[-1].message.id)
    third = await scene.broker.dead_letters(queue, limit=2, after=second[-1].message.id)
    assert [labels(page) for page in (first, second, third)] == [["a", "b"], ["c", "d"], ["e"]]
    assert await scene.broker.dead_letters(queue, after=third[-1].message.id) == []


@proves("C8")
async def test_pages_order_by_death_not_by_publication(scene: Scene) -> None:
    """the oldest is the one that died first."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b c"))
    consumer = await scene.consume(queue)
    dying = list(reversed(await scene.take(consumer, 3)))
    for delivery in dying:
        await scene.do(consumer, Dead(failure()), delivery)
        await scene.pass_time(scene.unit / 10)
    assert labels(await scene.broker.dead_letters(queue)) == labels(dying)


@proves("C8")
async def test_emptying_page_by_page_leaves_none_out(scene: Scene) -> None:
    """whoever discards or redrives each page before asking for the next sees every letter once."""
    queue = await scene.queue()
    await scene.bury(queue, *scene.messages(queue, "a b c d e f"))
    seen, after = [], None
    for operation in (scene.broker.discard, scene.broker.redrive, scene.broker.discard):
        page = await scene.broker.dead_letters(queue, after=after, limit=2)
        seen += labels(page)
        after = page[-1].message.id
        assert await operation(queue, [letter.message.id for letter in page]) == [letter.message.id for letter in page]
    assert seen == ["a", "b", "c", "d", "e", "f"]
    assert await scene.broker.dead_letters(queue) == []


@proves("C8")
async def test_dead_letters_by_id(scene: Scene) -> None:
    """those of the given ids that are dead, oldest first; no ids, no letters."""
    queue = await scene.queue()
    sent = scene.messages(queue, "a b c")
    await scene.bury(queue, *sent)
    wanted = [sent[2].id, new_id(), sent[0].id]
    assert labels(await scene.broker.dead_letters(queue, ids=wanted)) == ["a", "c"]
    assert await scene.broker.dead_letters(queue, ids=[]) == []


@proves("C8", "I14")
async def test_redrive(scene: Scene) -> None:
    """redriven letters are ready at once, as attempt 1, with their history; the others stay."""
    queue = await scene.queue()
    sent = scene.messages(queue, "a b c")
    await scene.bury(queue, *sent)
    moved = await scene.broker.redrive(queue, [sent[0].id, new_id(), sent[2].id])
    assert sorted(moved) == sorted([sent[0].id, sent[2].id])
    assert await scene.counts(queue) == {"ready": 2, "dead": 1}
    consumer = await scene.consume(queue)
    got = await scene.take(consumer, 2)
    assert sorted(labels(got)) == ["a", "c"]
    assert [(delivery.attempt, delivery.suspect) for delivery in got] == [(1, False)] * 2
    assert {delivery.message.id: delivery.message for delivery in got} == {sent[0].id: sent[0], sent[2].id: sent[2]}
    await scene.ack(consumer, *got)
    assert labels(await scene.broker.dead_letters(queue)) == ["b"]


@proves("C8", "I14")
async def test_history_survives_redrive(scene: Scene) -> None:
    """what dies again has all its failures, from the first on, and tells how often it was redriven."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    consumer = await scene.consume(queue)
    for life in (1, 2, 3):
        delivery = await scene.take_one(consumer)
        assert delivery.attempt == 1
        await scene.do(consumer, Retry(delay=0.0, failure=failure(1, text=f"life {life} first")), delivery)
        delivery = await scene.take_one(consumer)
        assert delivery.attempt == 2
        await scene.do(consumer, Dead(failure(2, text=f"life {life} last")), delivery)
        (letter,) = await scene.broker.dead_letters(queue)
        assert letter.redriven == life - 1
        assert [entry.message for entry in letter.failures] == [
            f"life {number} {which}" for number in range(1, life + 1) for which in ("first", "last")
        ]
        assert await scene.broker.redrive(queue, [message.id]) == [message.id]
    assert len(await scene.take(consumer)) == 1


@proves("C8", "I14")
@requires("expiry")
async def test_redrive_after_expiry(scene: Scene) -> None:
    """whoever redrives wants it handled: an expires_at that passed while it was dead does not drop it."""
    queue = await scene.queue()
    message = scene.message(queue, expires_at=scene.now() + scene.unit)
    await scene.bury(queue, message)
    await scene.pass_time(2 * scene.unit)
    assert await scene.broker.redrive(queue, [message.id]) == [message.id]
    consumer = await scene.consume(queue)
    await scene.ack(consumer, await scene.take_one(consumer))


@proves("C8", "I14")
async def test_redriven_once(scene: Scene) -> None:
    """a second redrive of the same letter moves nothing, also twice in one call: one message comes of it."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.bury(queue, message)
    assert await scene.broker.redrive(queue, [message.id, message.id]) == [message.id]
    assert await scene.broker.redrive(queue, [message.id]) == []
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    await scene.nothing(consumer)
    assert await scene.broker.redrive(queue, [message.id]) == []
    await scene.ack(consumer, delivery)
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {}


@proves("C8")
async def test_only_the_dead_are_moved(scene: Scene) -> None:
    """redrive and discard leave alone what waits or runs."""
    queue = await scene.queue()
    running, waiting = scene.messages(queue, "running waiting")
    await scene.publish(running, waiting)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    ids = [running.id, waiting.id]
    assert await scene.broker.redrive(queue, ids) == []
    assert await scene.broker.discard(queue, ids) == []
    assert await scene.counts(queue) == {"ready": 1, "running": 1}
    await scene.ack(consumer, delivery)


@proves("C8")
async def test_discard(scene: Scene) -> None:
    """a discarded letter is gone for good; the others stay."""
    queue = await scene.queue()
    sent = scene.messages(queue, "a b")
    await scene.bury(queue, *sent)
    assert await scene.broker.discard(queue, [sent[0].id, new_id()]) == [sent[0].id]
    assert await scene.broker.discard(queue, [sent[0].id]) == []
    assert await scene.broker.redrive(queue, [sent[0].id]) == []
    assert labels(await scene.broker.dead_letters(queue)) == ["b"]
    await scene.nothing(await scene.consume(queue))


@proves("C8")
async def test_a_redrive_wakes_the_waiting(scene: Scene) -> None:
    """a consumer that waits gets what another broker redrives."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.bury(queue, message)
    consumer = await scene.consume(queue)
    waiting = asyncio.create_task(consumer.receive(1, None))
    await scene.settle()
    await (await scene.another_broker()).redrive(queue, [message.id])
    async with asyncio.timeout(scene.harness.patience):
        assert labels(await waiting) == ["m"]


@proves("I11", "I10")
async def test_five_strikes(scene: Scene) -> None:
    """four retries and a dead-lettering are five deliveries, one dead letter, and nothing left."""
    queue = await scene.queue()
    await scene.publish(scene.message(queue))
    consumer = await scene.consume(queue)
    for _ in range(4):
        await scene.fail(consumer, await scene.take_one(consumer), delay=scene.unit)
        await scene.pass_time(scene.unit)
    await scene.do(consumer, Dead(failure(5)), await scene.take_one(consumer))
    await scene.pass_time(scene.lease * 2)
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {"dead": 1}
    assert resurrected(scene.history, queue) == miscounted(scene.history, queue) == []


@proves("I34", "I14")
@requires("jobs")
async def test_a_redriven_job_lives_again(scene: Scene) -> None:
    """only a redrive leads from dead back to ready; then it can succeed, and its failures are remembered."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.bury(queue, message)
    assert (await scene.record(message.id)).state is JobState.DEAD
    await scene.broker.redrive(queue, [message.id])
    record = await scene.record(message.id)
    assert (record.state, record.attempt, record.finished_at) == (JobState.READY, 1, None)
    consumer = await scene.consume(queue)
    await scene.ack(consumer, await scene.take_one(consumer))
    record = await scene.record(message.id)
    assert (record.state, len(record.failures)) == (JobState.SUCCEEDED, 1)
