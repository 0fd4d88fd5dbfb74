"""Unique jobs and debounce, as producers ask for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from postroom import App, ConfigurationError, IdempotencyConflict, PublishFailed, QueueFull, UnsupportedOperation
from postroom.broker.base import Broker, Subscription, Topic
from postroom.broker.demands import unmet
from postroom.broker.memory import MemoryBroker
from postroom.broker.sqlite import SQLiteBroker, janitor
from postroom.handler import Upload
from postroom.message import Message, new_id
from postroom.testing.clock import ManualClock
from tests.conftest import working


@pytest.fixture
def shop(app: App) -> App:
    @app.task(queue="reports", unique="until_done")
    def report(day: str, pages: int = 1) -> str:
        return f"{day}: {pages}"

    return app


def test_the_same_arguments_are_one_job(shop: App) -> None:
    report = shop.tasks["report"]
    first, again, other = report.enqueue("monday"), report.enqueue("monday"), report.enqueue("tuesday")
    assert first.id == again.id != other.id
    with working(shop):
        assert (first.result(10), other.result(10)) == ("monday: 1", "tuesday: 1")
        assert report.enqueue("monday").id != first.id


def test_a_key_stands_for_the_arguments(shop: App) -> None:
    using = shop.tasks["report"].using(idempotency_key="weekly")
    first = using.enqueue("monday")
    assert using.enqueue("monday").id == first.id
    with pytest.raises(IdempotencyConflict):
        using.enqueue("tuesday")


def test_a_time(shop: App) -> None:
    """It counts whatever becomes of the job."""
    using = shop.tasks["report"].using(unique=3600)
    first = using.enqueue("monday")
    with working(shop):
        first.result(10)
    assert using.enqueue("monday").id == first.id


def test_debounce(shop: App) -> None:
    """The last call counts, and runs when nothing came for a while; it needs the place of the one it replaces only."""
    debounced = shop.tasks["report"].using(unique="until_started", replace=True, idempotency_key="weekly", delay=0.3)
    jobs = [debounced.enqueue("monday", pages) for pages in (1, 2, 3)]
    assert [job.status().state for job in jobs] == ["cancelled", "cancelled", "scheduled"]
    with working(shop):
        assert jobs[2].result(10) == "monday: 3"


def test_what_is_replaced_makes_room(url: str) -> None:
    with App(url, queue_limit=1) as app:

        @app.task
        def report(pages: int) -> None: ...

        debounced = report.using(unique="until_started", replace=True, idempotency_key="weekly")
        first, second = debounced.enqueue(1), debounced.enqueue(2)
        assert (first.status().state, second.status().state) == ("cancelled", "ready")
        third, fourth = debounced.enqueue_many([debounced.call(3), debounced.call(4)])
        assert [job.status().state for job in (second, third, fourth)] == ["cancelled", "cancelled", "ready"]
        assert app.stats()[0].ready == 1
        # Whoever was refused makes no room.
        other = report.using(unique="until_started", replace=True, idempotency_key="daily")
        with pytest.raises(PublishFailed) as refusal:
            other.enqueue_many([other.call(5), other.call(6)])
        assert len(refusal.value.unconfirmed) == 2
        with pytest.raises(QueueFull):
            other.enqueue(7)
        assert app.stats()[0].ready == 1


def test_what_waits_behind_it_goes_on(url: str) -> None:
    """Of one key the first holds back the others; not once it has been replaced."""
    with App(url) as app:

        @app.task(ordered=True)
        def report(pages: int) -> int:
            return pages

        debounced = report.using(key="k", unique="until_started", replace=True, idempotency_key="weekly", delay=60)
        first, behind = debounced.enqueue(1), report.using(key="k").enqueue(2)
        assert (first.status().state, behind.status().state) == ("scheduled", "ready")
        second = debounced.enqueue(3)
        with working(app):
            assert behind.result(10) == 2
        assert (first.status().state, second.status().state) == ("cancelled", "scheduled")


def check_beside_a_server(app: App) -> None:
    """With a store beside a broker that knows no keys: what is replaced is there, and is not run."""

    @app.task(queue="reports")
    def report(pages: int) -> int:
        return pages

    debounced = report.using(unique="until_started", replace=True, idempotency_key="weekly")
    first, second = debounced.enqueue(1), debounced.enqueue(2)
    assert (first.status().state, second.status().state) == ("cancelled", "ready")
    unique = report.using(unique="until_done")
    one, same, other = unique.enqueue_many([unique.call(3), unique.call(3), unique.call(4)])
    assert one.id == same.id != other.id
    with working(app):
        assert [job.result(timeout=30) for job in (second, one, other)] == [2, 3, 4]
        assert unique.enqueue(3).id != one.id
    assert (first.status().state, first.status().started_at) == ("cancelled", None)


def test_with_a_store(tmp_path: Path) -> None:
    with App(f"sqlite:///{tmp_path}/a.db") as app:

        @app.task(unique="until_started")
        def report(pages: int) -> None: ...

        calls = [report.call(1), report.call(2), report.call(1)]
        first, other, again = report.enqueue_many(calls)
        assert first.id == again.id != other.id


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_keys_go_with_their_messages(kind: str, tmp_path: Path) -> None:
    """A key without a window is remembered no longer than the message that held it."""

    async def main() -> int:
        clock = ManualClock()
        memory = MemoryBroker(f"memory://{uuid4().hex}", clock=clock)
        sqlite = SQLiteBroker(f"sqlite:///{tmp_path}/a.db", clock=clock)
        broker: Broker = memory if kind == "memory" else sqlite
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        base = Message(id="", topic="q", name="n", body=b"", expires_at=clock.now() + 1.0, result_ttl=1.0)
        sent = [
            msgspec.structs.replace(base, id=new_id(), unique="until_done", idempotency_key=f"k{number}")
            for number in range(10)
        ]
        assert await broker.publish(sent) == [message.id for message in sent]
        for _ in range(2):
            await clock.advance(10.0)
            await broker.stats()
            if kind == "sqlite":
                await sqlite.engine.write(lambda connection: janitor.step(connection, sqlite.now()))
        if kind == "memory":
            with memory._opened() as state:
                left = len(state._dedup._firsts)
        else:
            left = sqlite.engine.connection.execute("SELECT count(*) FROM dedup").fetchone()[0]
        await broker.close()
        return left

    assert asyncio.run(main()) == 0


def test_what_does_not_go_together_is_refused(app: App) -> None:
    for unique, words in (("for_ever", "until_done"), (0, "more than 0"), (-1, "at least 0")):
        with pytest.raises(ConfigurationError, match=words):
            app.task(unique=unique)(lambda: None)  # type: ignore[call-overload]

    @app.task
    def report(pages: int) -> None: ...

    @app.task(unique="until_done")
    def show(picture: Upload) -> None: ...

    for unique in (None, "until_done", 60):
        wanted: Any = unique
        with pytest.raises(ConfigurationError, match="until_started"):
            report.using(unique=wanted, replace=True)
    with pytest.raises(ConfigurationError, match="two copies of one file"):
        show.enqueue(Path(__file__))


def test_a_broker_that_cannot_is_named() -> None:
    poor = Message(id="1", topic="q", name="n", body=b"", idempotency_key="k", unique="until_done")

    refusal = unmet(msgspec.structs.replace(MemoryBroker.capabilities, unique=False), poor, 0.0)
    assert isinstance(refusal, UnsupportedOperation)
    assert refusal.capability == "unique"
