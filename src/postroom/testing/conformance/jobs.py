"""Status, results, progress and cancellation."""

from __future__ import annotations

from postroom.broker.base import Ack, Cancel, Dead, Release, Retry
from postroom.message import JobState, Progress, new_id
from postroom.testing.scene import Scene, failure
from postroom.testing.suite import proves, requires


@proves("I34")
@requires("jobs")
async def test_the_life_of_a_job(scene: Scene) -> None:
    """ready, running, retrying, running, succeeded: with attempts, times, failures and the result."""
    queue = await scene.queue()
    message = scene.message(queue, name="add")
    await scene.publish(message)
    record = await scene.record(message.id)
    assert (record.id, record.subscription, record.topic, record.name) == (message.id, queue, queue, "add")
    assert (record.state, record.attempt, record.created_at) == (JobState.READY, 1, message.created_at)
    assert (record.started_at, record.finished_at, record.result) == (None, None, None)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    record = await scene.record(message.id)
    assert (record.state, record.attempt) == (JobState.RUNNING, 1)
    assert record.started_at is not None
    told = failure()
    await scene.do(consumer, Retry(delay=scene.unit, failure=told), delivery)
    record = await scene.record(message.id)
    assert (record.state, record.attempt, record.failures) == (JobState.RETRYING, 2, (told,))
    assert record.not_before is not None
    assert abs(record.not_before - (scene.now() + scene.unit)) <= scene.harness.patience
    await scene.pass_time(scene.unit)
    delivery = await scene.take_one(consumer)
    assert (await scene.record(message.id)).state is JobState.RUNNING
    await scene.do(consumer, Ack(b'{"sum":3}'), delivery)
    record = await scene.record(message.id)
    assert (record.state, record.attempt, record.result) == (JobState.SUCCEEDED, 2, b'{"sum":3}')
    assert record.failures == (told,)
    assert record.not_before is None
    assert record.finished_at is not None
    assert record.started_at is not None
    assert record.finished_at >= record.started_at >= record.created_at


@proves("I34")
@requires("jobs", "delay")
async def test_a_scheduled_job_says_when(scene: Scene) -> None:
    """scheduled with its time, then ready."""
    queue = await scene.queue()
    due = scene.now() + scene.unit
    message = scene.message(queue, not_before=due, expires_at=due + 100.0)
    await scene.publish(message)
    record = await scene.record(message.id)
    assert record.state is JobState.SCHEDULED
    assert record.not_before is not None
    assert abs(record.not_before - due) < 0.01
    assert record.expires_at is not None
    assert abs(record.expires_at - (due + 100.0)) < 0.01
    await scene.pass_time(scene.unit)
    record = await scene.record(message.id)
    assert (record.state, record.not_before) == (JobState.READY, None)


@proves("I34")
@requires("jobs")
async def test_final_states(scene: Scene) -> None:
    """each outcome leaves its state, final, and it stays so."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    for outcome, state in (
        (Ack(), JobState.SUCCEEDED),
        (Dead(failure()), JobState.DEAD),
        (Cancel(), JobState.CANCELLED),
    ):
        message = scene.message(queue)
        await scene.publish(message)
        delivery = await scene.take_one(consumer)
        await scene.do(consumer, outcome, delivery)
        record = await scene.record(message.id)
        assert (record.state, record.attempt, record.finished_at is not None) == (state, 1, True)
        await scene.try_settle(consumer, delivery, Release())
        await scene.publish(message)
        await scene.pass_time(scene.lease * 2)
        assert (await scene.record(message.id)).state is state


@proves("I34")
@requires("jobs", "expiry")
async def test_an_expired_job_says_so(scene: Scene) -> None:
    """its state is expired though no consumer came by; the attempt never started."""
    queue = await scene.queue()
    message = scene.message(queue, expires_at=scene.now() + scene.unit)
    await scene.publish(message)
    await scene.pass_time(2 * scene.unit)
    await scene.nothing(await scene.consume(queue))
    record = await scene.record(message.id)
    assert (record.state, record.started_at) == (JobState.EXPIRED, None)


@proves("I34", "C7")
@requires("jobs")
async def test_a_lost_worker_is_remembered(scene: Scene) -> None:
    """the death of a holder is a failure in the record, and a running job is not shown as ended."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    await scene.kill(frozen, started=[await scene.take_one(frozen)])
    await scene.ack(other, await scene.take_one(other))
    record = await scene.record(message.id)
    assert record.state is JobState.SUCCEEDED
    assert [(entry.attempt, entry.reason) for entry in record.failures] == [(1, "worker_lost")]


@proves("C15")
@requires("jobs")
async def test_records_are_forgotten_in_time(scene: Scene) -> None:
    """kept for result_ttl after the end, not from the start, and then gone; with 0 at once."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    kept, dropped = scene.message(queue, result_ttl=4 * scene.unit), scene.message(queue, result_ttl=0.0)
    await scene.publish(kept, dropped)
    deliveries = await scene.take(consumer, 2)
    await scene.pass_time(scene.unit)
    await scene.do(consumer, Ack(b"1"), *deliveries)
    assert await scene.broker.jobs.get(dropped.id) == []
    await scene.pass_time(2.5 * scene.unit)
    assert (await scene.record(kept.id)).result == b"1"
    await scene.pass_time(2 * scene.unit)
    assert await scene.broker.jobs.get(kept.id) == []
    assert await scene.broker.jobs.search(subscription=queue) == []


@proves("I34")
@requires("jobs")
async def test_unknown_jobs(scene: Scene) -> None:
    """of an unknown id there is no record, and it cannot be cancelled."""
    assert await scene.broker.jobs.get(new_id()) == []
    assert await scene.broker.jobs.cancel(new_id()) == "unknown"


@proves("I34", "C9")
@requires("jobs")
async def test_an_event_has_a_record_for_each_subscription(scene: Scene) -> None:
    """one each, independent; if nobody wanted it a single one, succeeded, without a subscription."""
    topic = await scene.topic()
    unwanted = scene.message(topic)
    await scene.publish(unwanted)
    record = await scene.record(unwanted.id)
    assert (record.subscription, record.state) == ("", JobState.SUCCEEDED)
    names = [await scene.subscribe(topic), await scene.subscribe(topic)]
    message = scene.message(topic)
    await scene.publish(message)
    consumer = await scene.consume(names[0])
    await scene.ack(consumer, await scene.take_one(consumer))
    records = {record.subscription: record.state for record in await scene.broker.jobs.get(message.id)}
    assert records == {names[0]: JobState.SUCCEEDED, names[1]: JobState.READY}


@proves("I34")
@requires("jobs")
async def test_search(scene: Scene) -> None:
    """newest first, by subscription and state, no more than the limit."""
    queue, other = await scene.queue(), await scene.queue()
    sent = scene.messages(queue, "a b c d")
    for message in sent:
        await scene.publish(message)
    foreign = scene.message(other)
    await scene.publish(foreign)
    consumer = await scene.consume(queue)
    first = await scene.take_one(consumer)
    await scene.ack(consumer, first)
    jobs = scene.broker.jobs
    assert [record.id for record in await jobs.search(subscription=queue)] == [message.id for message in sent[::-1]]
    assert [record.id for record in await jobs.search(subscription=queue, limit=2)] == [sent[3].id, sent[2].id]
    done = await jobs.search(subscription=queue, state=JobState.SUCCEEDED)
    assert [record.id for record in done] == [first.message.id]
    ready = await jobs.search(subscription=queue, state=JobState.READY)
    assert [record.id for record in ready] == [m.id for m in sent[::-1] if m.id != first.message.id]
    assert (await jobs.search(limit=1))[0].id == foreign.id


@proves("I34")
@requires("jobs", "delay")
async def test_search_by_states_that_pass_with_time(scene: Scene) -> None:
    """scheduled, running and retrying are told apart."""
    queue = await scene.queue()
    later = scene.message(queue, not_before=scene.now() + 50 * scene.unit)
    await scene.publish(*scene.messages(queue, "failed running"), later)
    consumer = await scene.consume(queue)
    failed, running = await scene.take(consumer, 2)
    await scene.fail(consumer, failed, delay=50 * scene.unit)
    for state, wanted in (
        (JobState.SCHEDULED, later.id),
        (JobState.RUNNING, running.message.id),
        (JobState.RETRYING, failed.message.id),
    ):
        found = await scene.broker.jobs.search(subscription=queue, state=state)
        assert [(record.id, record.state) for record in found] == [(wanted, state)]


@proves("I34", "C2")
@requires("jobs")
async def test_a_purged_job_is_cancelled(scene: Scene) -> None:
    """an id that was given out is not unknown after a purge."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    assert await scene.broker.purge(queue) == 1
    assert (await scene.record(message.id)).state is JobState.CANCELLED


@proves("I34")
@requires("jobs")
async def test_progress(scene: Scene) -> None:
    """the latest progress of a running job is told, and a new attempt starts without."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    jobs = scene.broker.jobs
    for progress in (Progress(0.25), Progress(0.5, "rendering")):
        await jobs.report([(delivery, progress)])
        assert (await scene.record(message.id)).progress == progress
    await scene.fail(consumer, delivery)
    await scene.take_one(consumer)
    assert (await scene.record(message.id)).progress is None


@proves("C5")
@requires("jobs")
async def test_a_zombie_cannot_report(scene: Scene) -> None:
    """progress of a holder whose lease is lost is not written; nor of one that has settled."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    frozen, other = await scene.consume(queue), await scene.consume(queue)
    old = await scene.take_one(frozen)
    await scene.kill(frozen)
    new = await scene.take_one(other)
    await scene.broker.jobs.report([(new, Progress(0.1)), (old, Progress(0.9))])
    assert (await scene.record(message.id)).progress == Progress(0.1)
    await scene.ack(other, new)
    await scene.broker.jobs.report([(old, Progress(0.9)), (new, Progress(0.8))])
    assert (await scene.record(message.id)).progress in (None, Progress(0.1))


@proves("I31")
@requires("jobs")
async def test_cancelled_before_start_never_starts(scene: Scene) -> None:
    """a waiting, scheduled or retrying job is cancelled at once and for good."""
    queue = await scene.queue()
    consumer = await scene.consume(queue)
    retrying = scene.message(queue, "retrying")
    await scene.publish(retrying)
    await scene.fail(consumer, await scene.take_one(consumer), delay=scene.unit)
    waiting = scene.message(queue, "waiting")
    await scene.publish(waiting)
    for message in (retrying, waiting):
        assert await scene.broker.jobs.cancel(message.id) == "cancelled"
        assert (await scene.record(message.id)).state is JobState.CANCELLED
        assert await scene.broker.jobs.cancel(message.id) == "finished"
    await scene.pass_time(2 * scene.unit)
    await scene.nothing(consumer)
    assert await scene.counts(queue) == {}


@proves("I31")
@requires("jobs")
async def test_cancelling_what_runs_tells_its_worker(scene: Scene) -> None:
    """a running job is only asked to stop; its worker learns of it, and no other."""
    queue = await scene.queue()
    await scene.publish(*scene.messages(queue, "a b"))
    consumer = await scene.consume(queue)
    asked, other = await scene.take(consumer, 2)
    jobs = scene.broker.jobs
    assert await jobs.cancelled([asked, other]) == []
    assert await jobs.cancel(asked.message.id) == "requested"
    assert await jobs.cancelled([asked, other]) == [asked]
    assert (await scene.record(asked.message.id)).state is JobState.RUNNING
    await scene.do(consumer, Cancel(), asked)
    assert (await scene.record(asked.message.id)).state is JobState.CANCELLED
    assert await jobs.cancelled([asked, other]) == []


@proves("I31")
@requires("jobs")
async def test_what_finishes_in_spite_of_a_cancellation_has_succeeded(scene: Scene) -> None:
    """the effect has happened, so the record says so."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    await scene.broker.jobs.cancel(message.id)
    await scene.do(consumer, Ack(b"1"), delivery)
    assert (await scene.record(message.id)).state is JobState.SUCCEEDED
    assert await scene.broker.jobs.cancel(message.id) == "finished"


@proves("I31")
@requires("jobs")
async def test_a_cancelled_job_is_not_tried_again(scene: Scene) -> None:
    """once its cancellation was requested, neither retry, nor release, nor the death of its worker brings it back."""
    for outcome in (Retry(delay=0.0, failure=failure()), Release(), Release(delay=scene.unit), None):
        queue = await scene.queue()
        message = scene.message(queue)
        await scene.publish(message)
        consumer = await scene.consume(queue)
        delivery = await scene.take_one(consumer)
        assert await scene.broker.jobs.cancel(message.id) == "requested"
        if outcome is None:
            await scene.kill(consumer, started=[delivery])
        else:
            await scene.do(consumer, outcome, delivery)
        await scene.pass_time(2 * scene.unit)
        other = await scene.consume(queue)
        await scene.nothing(other)
        await scene.nothing(other)
        record = await scene.record(message.id)
        assert record.state is JobState.CANCELLED, outcome
        if isinstance(outcome, Retry):
            assert len(record.failures) == 1, "what went wrong at last is kept"


@proves("I31", "C9")
@requires("jobs")
async def test_cancelling_an_event_cancels_every_copy(scene: Scene) -> None:
    """those that wait end at once, the running are told."""
    topic = await scene.topic()
    waiting, running = await scene.subscribe(topic), await scene.subscribe(topic)
    message = scene.message(topic)
    await scene.publish(message)
    consumer = await scene.consume(running)
    delivery = await scene.take_one(consumer)
    assert await scene.broker.jobs.cancel(message.id) == "requested"
    assert await scene.broker.jobs.cancelled([delivery]) == [delivery]
    await scene.nothing(await scene.consume(waiting))
    states = {record.subscription: record.state for record in await scene.broker.jobs.get(message.id)}
    assert states == {waiting: JobState.CANCELLED, running: JobState.RUNNING}


@proves("I34")
@requires("jobs")
async def test_other_brokers_see_the_same(scene: Scene) -> None:
    """status and cancellation work from any connection."""
    queue = await scene.queue()
    message = scene.message(queue)
    await scene.publish(message)
    consumer = await scene.consume(queue)
    delivery = await scene.take_one(consumer)
    jobs = (await scene.another_broker()).jobs
    assert [record.state for record in await jobs.get(message.id)] == [JobState.RUNNING]
    assert await jobs.cancel(message.id) == "requested"
    assert await scene.broker.jobs.cancelled([delivery]) == [delivery]
