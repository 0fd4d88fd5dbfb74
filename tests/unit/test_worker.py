"""A worker in this process, through the public interface, on both embedded brokers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from postroom import (
    INJECTED,
    App,
    ConfigurationError,
    Context,
    JobCancelled,
    JobFailed,
    JobState,
    QueueFull,
    Reject,
    Retry,
    RetryPolicy,
    Snooze,
    exponential,
)
from postroom.broker.base import Broker, Delivery, Outcome
from postroom.errors import SettlementError
from postroom.testing.defects import DefectiveBroker, DefectiveConsumer
from tests.conftest import wait_until, working

FAST = RetryPolicy(backoff=exponential(first=0.01, max=0.02))


class Pool:
    name = "pool"


@dataclass
class Signup:
    user: str


def test_sync_and_async_tasks_return_results(app: App) -> None:
    @app.task
    def double(x: int) -> int:
        return 2 * x

    @app.task
    async def triple(x: int) -> int:
        await asyncio.sleep(0)
        return 3 * x

    with working(app):
        assert double.enqueue(4).result(timeout=10) == 8
        assert triple.enqueue(4).result(timeout=10) == 12


def test_every_one_of_many_runs_once(app: App) -> None:
    seen: list[int] = []

    @app.task
    async def note(x: int) -> None:
        seen.append(x)

    with working(app, drain=True):
        jobs = note.enqueue_many(note.call(x) for x in range(2500))
        wait_until(lambda: len(seen) >= 2500, "all have run", 30)
        for job in (jobs[0], jobs[-1]):
            assert job.outcome(timeout=5).state is JobState.SUCCEEDED
    assert sorted(seen) == list(range(2500))


def test_five_strikes_make_a_dead_letter(app: App) -> None:
    starts: list[int] = []

    @app.task(retry=FAST)
    def fail(ctx: Context = INJECTED) -> None:
        starts.append(ctx.attempt)
        raise ValueError("never")

    with working(app):
        job = fail.enqueue()
        with pytest.raises(JobFailed, match="never") as caught:
            job.result(timeout=10)
    assert starts == [1, 2, 3, 4, 5]
    assert caught.value.failure is not None
    status = job.status()
    assert [failure.attempt for failure in status.failures] == [1, 2, 3, 4, 5]
    assert all("raise ValueError" in failure.traceback for failure in status.failures)


def test_a_failing_message_does_not_hold_up_others(app: App) -> None:
    @app.task(retry=RetryPolicy(backoff=lambda attempt: 3600.0))
    async def fail() -> None:
        raise ValueError

    @app.task
    async def fine() -> str:
        return "fine"

    with working(app, concurrency=1):
        failing = fail.enqueue()
        assert fine.enqueue().result(timeout=10) == "fine"
        wait_until(lambda: failing.status().state is JobState.RETRYING, "the other waits for its retry")


def test_signals_of_a_handler(app: App) -> None:
    attempts: dict[str, list[int]] = {"snooze": [], "retry": []}

    @app.task
    async def snooze(ctx: Context = INJECTED) -> None:
        attempts["snooze"].append(ctx.attempt)
        if len(attempts["snooze"]) < 3:
            raise Snooze(0.01)

    @app.task
    def retry(ctx: Context = INJECTED) -> None:
        attempts["retry"].append(ctx.attempt)
        if len(attempts["retry"]) < 3:
            raise Retry(delay=0.01)

    @app.task
    def reject() -> None:
        raise Reject("no such order")

    with working(app):
        snooze.enqueue().result(timeout=10)
        retry.enqueue().result(timeout=10)
        with pytest.raises(JobFailed, match="no such order"):
            reject.enqueue().result(timeout=10)
    assert attempts == {"snooze": [1, 1, 1], "retry": [1, 2, 3]}


def test_fan_out_reaches_every_subscription_independently(app: App) -> None:
    seen: dict[str, list[str]] = {"mail": [], "search": [], "eu": []}
    signups = app.topic("user.signup", Signup)

    @signups.subscribe("mail")
    async def mail(event: Signup) -> None:
        seen["mail"].append(event.user)

    @app.subscribe("user.*", "search", retry=FAST)
    def search(event: dict[str, Any]) -> None:
        seen["search"].append(event["user"])
        raise ValueError("down")

    @app.subscribe("#", "eu", where={"region": "eu"})
    def eu(event: Any, ctx: Context) -> None:
        seen["eu"].append(ctx.message.headers["region"])

    with working(app):
        job = signups.publish(Signup("ann"))
        other = signups.using(headers={"region": "eu"}).publish(Signup("bob"))
        wait_until(lambda: job.status().state is JobState.DEAD, "ann is dead in one subscription")
        wait_until(lambda: other.status().state is JobState.DEAD, "bob too")
    assert sorted(seen["mail"]) == ["ann", "bob"]
    assert sorted(seen["search"]) == ["ann"] * 5 + ["bob"] * 5
    assert seen["eu"] == ["eu"]
    assert job.status().subscriptions == {"mail": "succeeded", "search": "dead"}


def test_a_late_subscription_gets_what_was_retained(url: str) -> None:
    with App(url) as first:
        first.topic("t", Signup).publish(Signup("early"))
        late = App(url)
        topic, seen = late.topic("t", Signup), []

        @topic.subscribe("late", start="earliest")
        def note(event: Signup) -> None:
            seen.append(event.user)

        with working(late):
            topic.publish(Signup("now"))
            wait_until(lambda: len(seen) == 2, "both arrived")
        late.close()
    assert sorted(seen) == ["early", "now"]


def test_a_timeout_ends_async_and_sync_handlers(app: App) -> None:
    ended: list[str] = []

    @app.task(timeout=0.1, retry=RetryPolicy(max_attempts=1))
    async def sleep() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("async")

    @app.task(timeout=0.1, retry=RetryPolicy(max_attempts=1))
    def spin() -> None:
        try:
            while True:
                pass
        finally:
            ended.append("sync")

    with working(app):
        for task in (sleep, spin):
            with pytest.raises(JobFailed) as caught:
                task.enqueue().result(timeout=10)
            assert caught.value.failure is not None
            assert caught.value.failure.reason == "timeout"
    assert ended == ["async", "sync"]


def test_cancelling(app: App) -> None:
    began, ended = threading.Event(), threading.Event()

    @app.task
    async def long() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    @app.task(queue="other")
    def never() -> None: ...

    waiting = never.using(delay=60).enqueue()
    assert waiting.cancel() == "cancelled"
    with working(app, queues=["default"]):
        running = long.enqueue()
        assert began.wait(10)
        assert running.cancel() == "requested"
        with pytest.raises(JobCancelled):
            running.result(timeout=10)
        assert ended.wait(5)
        assert running.cancel() == "finished"
    with pytest.raises(JobCancelled):
        waiting.result(timeout=0)


def test_expired_messages_never_start(app: App) -> None:
    started: list[int] = []

    @app.task
    def late() -> None:
        started.append(1)

    job = late.using(expires_in=0.001).enqueue()
    time.sleep(0.01)
    with working(app):
        wait_until(lambda: job.status().state is JobState.EXPIRED, "it has expired")
    assert not started


def test_a_blocked_loop_keeps_its_lease(app: App) -> None:
    starts: list[float] = []

    @app.task(lease=0.3)
    async def block() -> str:
        starts.append(time.monotonic())
        time.sleep(1.5)  # noqa: ASYNC251 -- blocking the loop for five leases is the point
        return "done"

    with working(app), working(app):
        assert block.enqueue().result(timeout=10) == "done"
    assert len(starts) == 1


def test_what_is_being_settled_is_not_taken_for_lost(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broker that is slow to answer, or a store that is written after it, outlasts a renewal of leases."""

    class Slow(DefectiveConsumer):
        async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
            answers = await super().settle(settlements)
            await asyncio.sleep(0.5)
            return answers

    class SlowBroker(DefectiveBroker):
        consumer_class = Slow

    class SlowApp(App):
        def make_broker(self) -> Broker:
            return SlowBroker(super().make_broker())

    with SlowApp(url) as app:

        @app.task(lease=0.3)
        def work() -> str:
            return "done"

        with working(app):
            assert work.enqueue().result(timeout=10) == "done"
    assert not [record for record in caplog.records if "lost the lease" in record.getMessage()]


def test_what_a_blocked_worker_cannot_start_goes_to_another(app: App) -> None:
    blocked, release = threading.Event(), threading.Event()

    @app.task
    async def block() -> None:
        blocked.set()
        release.wait(20)

    @app.task
    async def quick() -> str:
        return threading.current_thread().name

    with working(app):
        block.enqueue()
        assert blocked.wait(10)
        jobs = [quick.enqueue() for _ in range(20)]
        with working(app):
            for job in jobs:
                job.result(timeout=10)
        release.set()


def test_what_lay_here_while_the_process_was_frozen_is_not_started(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    turns = 0
    ahead = 100.0

    def monotonic() -> float:
        """So many seconds after the leases were taken."""
        nonlocal turns
        turns += 1
        return time.monotonic() + ahead

    @app.task
    def note(number: int) -> None:
        ran.append(number)

    monkeypatch.setattr("postroom.worker.run.time", SimpleNamespace(monotonic=monotonic, time=time.time))
    with working(app):
        job = note.enqueue(1)
        # Given back, and delivered again, each time too late.
        wait_until(lambda: turns > 3, "it was delivered")
        assert ran == []
        ahead = 0.0
        job.result(timeout=10)
    assert ran == [1]
    assert job.status().attempt == 1


def test_stopping_lets_handlers_finish_and_releases_the_rest(app: App) -> None:
    began, proceed = threading.Event(), threading.Event()

    @app.task
    def slow() -> str:
        began.set()
        proceed.wait(20)
        return "finished"

    @app.task
    def next_one(ctx: Context = INJECTED) -> int:
        return ctx.attempt

    with working(app, concurrency=1):
        job = slow.enqueue()
        assert began.wait(10)
        waiting = next_one.enqueue()
        threading.Timer(0.3, proceed.set).start()
    assert job.status().result == "finished"
    assert waiting.status().state is JobState.READY
    with working(app):
        assert waiting.result(timeout=10) == 1


def test_stopping_releases_uncounted_what_outlasts_the_grace(app: App) -> None:
    began, attempts = threading.Event(), []

    @app.task
    async def endless(ctx: Context = INJECTED) -> None:
        attempts.append(ctx.attempt)
        began.set()
        if len(attempts) == 1:
            await asyncio.sleep(60)

    with working(app, grace=0.05):
        job = endless.enqueue()
        assert began.wait(10)
    assert job.status().state is JobState.READY
    with working(app):
        job.result(timeout=10)
    assert attempts == [1, 1]


def test_draining_ends_by_itself(app: App) -> None:
    seen: list[int] = []

    @app.task
    async def note(x: int) -> None:
        seen.append(x)

    note.enqueue_many(note.call(x) for x in range(300))
    later = note.using(delay=3600).enqueue(-1)
    app.run_worker(drain=True)
    assert len(seen) == 300
    assert later.status().state is JobState.SCHEDULED


def test_undecodable_and_invalid_bodies_are_dead_at_once(app: App) -> None:
    from postroom.message import Message, new_id

    @app.task
    def task(a: int) -> None: ...

    ids = {body: new_id() for body in (b"\xff not json", b'{"a":"x"}', b'{"a":1,"b":2}', b"[]")}
    app.outlet.send([Message(id=ids[body], topic="default", name="task", body=body) for body in ids])
    with working(app):
        for body, job_id in ids.items():
            with pytest.raises(JobFailed) as caught:
                app.job(job_id).result(timeout=10)
            assert caught.value.failure is not None
            assert caught.value.failure.reason == ("undecodable" if body.startswith(b"\xff") else "invalid")


def test_unknown_tasks_are_parked(app: App) -> None:
    from postroom.message import Message, new_id

    @app.task
    def known() -> None: ...

    job = app.job(new_id())
    app.outlet.send([Message(id=job.id, topic="default", name="of_a_newer_version", body=b"{}")])
    with working(app):
        wait_until(lambda: job.status().state is JobState.SCHEDULED, "it is parked")
    assert job.status().attempt == 1


def test_resources_lifespan_and_middleware(app: App) -> None:
    events: list[str] = []

    @app.lifespan
    async def life() -> AsyncIterator[None]:
        events.append("start")
        yield
        events.append("stop")

    @app.resource
    def pool() -> Iterator[Pool]:
        events.append("open")
        yield Pool()
        events.append("close")

    @app.middleware
    async def outer(ctx: Context, call_next: Callable[[], Awaitable[Any]]) -> Any:
        events.append(f"before {ctx.message.name}")
        result = await call_next()
        events.append("after")
        return f"<{result}>"

    @app.task
    def sync(pool: Pool = INJECTED) -> str:
        return pool.name

    @app.task(name="coroutine")
    async def coroutine(pool: Pool = INJECTED) -> str:
        return pool.name

    with working(app):
        assert sync.enqueue().result(timeout=10) == "<pool>"
        assert coroutine.enqueue().result(timeout=10) == "<pool>"
    assert events == ["start", "open", "before sync", "after", "before coroutine", "after", "close", "stop"]


def test_context_variables_do_not_leak_between_messages(app: App) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    @app.task
    async def task() -> int:
        before = variable.get()
        variable.set(before + 1)
        return before

    with working(app, concurrency=1):
        assert [task.enqueue().result(timeout=10) for _ in range(3)] == [0, 0, 0]


def test_handlers_that_exit_do_not_end_the_worker(app: App) -> None:
    @app.task(retry=RetryPolicy(max_attempts=1))
    async def leave() -> None:
        raise SystemExit(3)

    @app.task(retry=RetryPolicy(max_attempts=1))
    def interrupt() -> None:
        raise KeyboardInterrupt

    with working(app):
        for task in (leave, interrupt):
            with pytest.raises(JobFailed):
                task.enqueue().result(timeout=10)


def test_progress_is_seen_while_it_runs(app: App) -> None:
    proceed = threading.Event()

    @app.task
    def slow(ctx: Context = INJECTED) -> None:
        ctx.progress(0.4, "rendering")
        proceed.wait(20)

    with working(app):
        job = slow.enqueue()
        progress = wait_until(lambda: job.status().progress, "progress is reported")
        proceed.set()
        job.result(timeout=10)
    assert (progress.fraction, progress.text) == (0.4, "rendering")


def test_one_key_runs_one_at_a_time_in_order(app: App) -> None:
    seen: list[tuple[str, int]] = []
    running: set[str] = set()

    @app.task(ordered=True, retry=FAST)
    async def step(key: str, n: int, ctx: Context = INJECTED) -> None:
        assert key not in running
        running.add(key)
        await asyncio.sleep(0.001)
        running.remove(key)
        if n == 3 and ctx.attempt == 1:
            raise ValueError("once")
        seen.append((key, n))

    jobs = [step.using(key=key).enqueue(key, n) for n in range(8) for key in "abc"]
    with working(app):
        for job in jobs:
            job.result(timeout=10)
    for key in "abc":
        assert [n for k, n in seen if k == key] == list(range(8))


def test_a_full_queue_refuses(url: str) -> None:
    with App(url, queue_limit=3) as app:

        @app.task
        def task() -> None: ...

        for _ in range(3):
            task.enqueue()
        with pytest.raises(QueueFull):
            task.enqueue()


def test_idempotency_keys_make_one_job(app: App) -> None:
    from postroom import IdempotencyConflict

    runs: list[int] = []

    @app.task
    def charge(amount: int) -> None:
        runs.append(amount)

    keyed = charge.using(idempotency_key="order-42")
    jobs = [keyed.enqueue(10) for _ in range(5)]
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(IdempotencyConflict):
        keyed.enqueue(11)
    with working(app):
        jobs[0].result(timeout=10)
    assert runs == [10]


def test_concurrent_producers_in_threads_and_loops(app: App) -> None:
    seen: list[int] = []

    @app.task
    async def note(x: int) -> None:
        seen.append(x)

    async def many(base: int) -> None:
        await asyncio.gather(*(note.aenqueue(base + x) for x in range(50)))

    def each(base: int) -> None:
        for x in range(20):
            note.enqueue(base + x)

    threads = [threading.Thread(target=lambda base=base: asyncio.run(many(base))) for base in (1000, 2000)]  # type: ignore[misc]
    threads += [threading.Thread(target=each, args=(base,)) for base in (3000, 4000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    app.run_worker(drain=True)
    assert len(seen) == len(set(seen)) == 140


def test_enqueue_in_a_running_loop_works_and_warns(app: App) -> None:
    @app.task
    def task() -> None: ...

    async def produce() -> str:
        with pytest.warns(RuntimeWarning, match="aenqueue"):
            return task.enqueue().id

    assert app.job(asyncio.run(produce())).status().state is JobState.READY


def test_a_plain_call_runs_here(app: App) -> None:
    @app.task
    def where(x: int, ctx: Context = INJECTED) -> tuple[int, int]:
        return x, ctx.attempt

    assert where(3) == (3, 1)


def test_an_app_without_handlers_refuses_to_work(app: App) -> None:
    with pytest.raises(ConfigurationError, match="nothing to work on"):
        app.run_worker()


def test_an_unknown_queue_is_refused_with_a_suggestion(app: App) -> None:
    @app.task(queue="thumbnails")
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match="did you mean 'thumbnails'"):
        app.run_worker(queues=["thumbnail"])


def test_isolation_needs_an_importable_app(app: App) -> None:
    @app.task(isolation="process")
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match="isolation"):
        app.run_worker()
