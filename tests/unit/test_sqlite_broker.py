"""What the SQLite broker keeps in its rows, and what that costs."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from postroom import BrokerUnavailable, ConfigurationError, JobState, TopicNotFound
from postroom.broker.base import Ack, Cancel, Consumer, Dead, Delivery, Outcome, Release, Retry, Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import Failure, Message, new_id
from postroom.testing.clock import ManualClock

FAILURE = Failure(attempt=1, reason="error", message="planted")
TOPICS = [Topic(name="q", queue=True), Topic(name="line", queue=True), Topic(name="t", retention=1000.0)]
SUBSCRIPTIONS = [
    Subscription(name="q", pattern="q"),
    Subscription(name="line", pattern="line", ordered=True),
    Subscription(name="all", pattern="#", ordered=True),
]


def message(**fields: Any) -> Message:
    return Message(**{"id": new_id(), "topic": "q", "name": "t", "body": b"{}", "created_at": time.time(), **fields})


def run(
    path: Path,
    do: Callable[[SQLiteBroker], Awaitable[None]],
    subscriptions: list[Subscription] = SUBSCRIPTIONS,
    clock: ManualClock | None = None,
) -> None:
    async def main() -> None:
        broker = SQLiteBroker(f"sqlite:///{path}", clock=clock)
        await broker.connect()
        try:
            await broker.declare(TOPICS, subscriptions)
            await do(broker)
        finally:
            await broker.close()

    asyncio.run(main())


async def work_off(consumer: Consumer) -> list[str]:
    names = []
    while deliveries := await consumer.receive(100, 0):
        names += [delivery.message.name for delivery in deliveries]
        assert await consumer.settle([(delivery, Ack()) for delivery in deliveries]) == [None] * len(deliveries)
    return names


def test_a_batch_keeps_its_order_whatever_its_messages_ask_for(tmp_path: Path) -> None:
    async def do(broker: SQLiteBroker) -> None:
        fields: list[dict[str, Any]] = [{}, {"headers": {"a": "b"}}, {}, {"key": "k"}, {"idempotency_key": "i"}, {}]
        await broker.publish([message(name=str(number), **more) for number, more in enumerate(fields)])
        assert await work_off(await broker.consume("q")) == ["0", "1", "2", "3", "4", "5"]

    run(tmp_path / "x.db", do)


def test_a_known_message_in_a_batch_holds_back_no_other_of_its_key(tmp_path: Path) -> None:
    async def do(broker: SQLiteBroker) -> None:
        consumer = await broker.consume("line")
        first = message(topic="line", key="k", name="first")
        await broker.publish([first])
        assert await work_off(consumer) == ["first"]
        await broker.publish([first, message(topic="line", key="k", name="second")])
        assert await work_off(consumer) == ["second"]

    run(tmp_path / "x.db", do)


def test_the_record_of_an_unwanted_event_ends_with_its_first_copy(tmp_path: Path) -> None:
    async def do(broker: SQLiteBroker) -> None:
        event = message(topic="t")
        await broker.publish([event])
        assert [record.subscription for record in await broker.jobs.get(event.id)] == [""]
        await broker.declare([], [Subscription(name="late", pattern="t", start="earliest")])
        assert [record.subscription for record in await broker.jobs.get(event.id)] == ["late"]

    run(tmp_path / "x.db", do, [Subscription(name=name, pattern=name) for name in ("q", "line")])


def test_a_queue_goes_with_its_subscription(tmp_path: Path) -> None:
    """Else it would accept jobs and drop them."""

    async def do(broker: SQLiteBroker) -> None:
        await broker.unsubscribe("q")
        (answer,) = await broker.publish([message()])
        assert isinstance(answer, TopicNotFound)
        with pytest.raises(ConfigurationError, match="has no subscription"):
            await broker.declare([Topic(name="q", queue=True)], [])

    run(tmp_path / "x.db", do, [Subscription(name="q", pattern="q"), Subscription(name="line", pattern="line")])


def test_a_purge_goes_in_steps_and_spares_what_comes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postroom.broker.sqlite.letters.PURGE_STEP", 10)

    async def do(broker: SQLiteBroker) -> None:
        old = [message(topic="line", key=f"k{n % 2}") for n in range(35)] + [message(topic="line") for _ in range(10)]
        await broker.publish(old)
        before = broker.engine.commits
        new = message(topic="line", key="k1", name="new")
        count, _ = await asyncio.gather(broker.purge("line"), broker.publish([new]))
        assert count == 45
        assert broker.engine.commits - before >= 5
        assert await work_off(await broker.consume("line")) == ["new"]
        records = [(await broker.jobs.get(one.id))[0] for one in old]
        assert {record.state for record in records} == {JobState.CANCELLED}

    run(
        tmp_path / "x.db",
        do,
        [Subscription(name="q", pattern="q"), Subscription(name="line", pattern="line", ordered=True)],
    )


@pytest.mark.parametrize("many", ["waiting", "of one key", "delayed", "of higher priority, delayed", "done", "dead"])
def test_what_lies_in_a_queue_makes_nothing_slower(tmp_path: Path, many: str) -> None:
    """Counted in instructions of SQLite's virtual machine, which no load of this computer can change."""

    async def steps_with(broker: SQLiteBroker, count: int) -> int:
        await fill(broker, many, count)
        consumer = await broker.consume("line")
        wanted = [message(topic="line", key="k" if many == "of one key" else None) for _ in range(3)]
        await broker.publish(wanted)
        await work_one(consumer)
        steps = 0

        def count_steps() -> None:
            nonlocal steps
            steps += 1

        broker.engine.connection.set_progress_handler(count_steps, 10)
        await broker.publish([message(topic="line")])
        await work_one(consumer)
        broker.engine.connection.set_progress_handler(None, 0)
        return steps

    async def work_one(consumer: Consumer) -> None:
        (delivery,) = await consumer.receive(1, 0)
        await consumer.settle([(delivery, Ack())])

    counts: list[int] = []

    async def do(broker: SQLiteBroker) -> None:
        counts.extend([await steps_with(broker, 50), await steps_with(broker, 5000)])

    run(tmp_path / "x.db", do)
    assert counts[1] < 1.3 * counts[0] + 20, counts


async def fill(broker: SQLiteBroker, many: str, count: int) -> None:
    fields: dict[str, dict[str, Any]] = {
        "of one key": {"key": "k"},
        "delayed": {"not_before": time.time() + 1000},
        "of higher priority, delayed": {"not_before": time.time() + 1000, "priority": 9},
    }
    await broker.publish([message(topic="line", **fields.get(many, {})) for _ in range(count)])
    outcome = {"done": Ack(), "dead": Dead(FAILURE)}.get(many)
    if outcome is not None:
        consumer = await broker.consume("line")
        while deliveries := await consumer.receive(1000, 0):
            await consumer.settle([(delivery, outcome) for delivery in deliveries])


def test_whatever_happens_the_rows_agree_with_each_other(tmp_path: Path) -> None:
    """A random life of three subscriptions, two of them ordered; after each step every row is looked at."""
    clock = ManualClock()
    rng = random.Random(7)

    async def do(broker: SQLiteBroker) -> None:
        consumers = [await broker.consume(name, lease=30.0) for name in ("q", "line", "all", "line")]
        held: list[tuple[Consumer, Delivery]] = []
        for _ in range(600):
            await step(broker, rng, clock, consumers, held)
            check_rows(broker.engine.connection)
        await clock.advance(10_000.0)
        for consumer in consumers:
            await work_off(consumer)
        rest = await broker.stats()
        assert [(one.ready, one.delayed, one.running) for one in rest] == [(0, 0, 0)] * 3

    run(tmp_path / "x.db", do, clock=clock)


async def step(
    broker: SQLiteBroker,
    rng: random.Random,
    clock: ManualClock,
    consumers: list[Consumer],
    held: list[tuple[Consumer, Delivery]],
) -> None:
    name = rng.choice(["q", "line", "all"])
    match rng.choice(["publish"] * 4 + ["receive"] * 4 + ["settle"] * 5 + ["advance", "redrive", "cancel", "other"]):
        case "publish":
            await broker.publish([random_message(rng, clock) for _ in range(rng.randrange(1, 5))])
        case "receive":
            consumer = rng.choice(consumers)
            deliveries = await consumer.receive(rng.randrange(1, 4), 0)
            consumer.started([delivery for delivery in deliveries if rng.random() < 0.5])
            held += [(consumer, delivery) for delivery in deliveries]
        case "settle" if held:
            consumer, delivery = held.pop(rng.randrange(len(held)))
            await consumer.settle([(delivery, random_outcome(rng))])
        case "advance":
            await clock.advance(rng.choice([1.0, 5.0, 40.0]))
        case "redrive":
            await broker.redrive(name, [letter.message.id for letter in await broker.dead_letters(name, limit=2)])
        case "cancel":
            for record in await broker.jobs.search(subscription=name, limit=2):
                await broker.jobs.cancel(record.id)
        case _:
            await rng.choice([lambda: broker.replay("all"), lambda: broker.purge(name)])()


def random_message(rng: random.Random, clock: ManualClock) -> Message:
    now = clock.now()
    return message(
        topic=rng.choice(["q", "line", "t"]),
        key=rng.choice([None, "a", "b"]),
        priority=rng.choice([0, 0, 3]),
        created_at=now,
        not_before=rng.choice([None, None, now + 3]),
        expires_at=rng.choice([None, None, now + 6]),
        idempotency_key=rng.choice([None, None, new_id()]),
        result_ttl=rng.choice([0.0, 60.0]),
    )


def random_outcome(rng: random.Random) -> Outcome:
    again = Retry(delay=rng.choice([0.0, 4.0]), failure=FAILURE, suspect=rng.random() < 0.3)
    return rng.choice([Ack(), Ack(b"1"), again, Release(), Release(4.0), Dead(FAILURE), Cancel()])


def check_rows(connection: sqlite3.Connection) -> None:
    for name, wrong in WRONG.items():
        assert connection.execute(wrong).fetchall() == [], name


# Conditions that no row of ``message`` may fulfil.
_NEVER = {
    "a waiting message has no lease": "state = 0 AND (lease <> 0 OR lane > 0)",
    "a leased one has": "state = 1 AND (lease = 0 OR lane <= 0 OR visible_at IS NULL)",
    "what has ended is not to be claimed": "state > 1 AND (visible_at NOT NULL OR lease <> 0)",
    "what has ended but is not dead will go": "state IN (2, 4, 5) AND purge_at IS NULL",
    "what is alive or dead stays": "state IN (0, 1, 3) AND purge_at NOT NULL",
    "what is alive or dead has its body": "state IN (0, 1, 3) AND body IS NULL",
    "only what is unsettled stands in a line": "state > 1 AND line NOT NULL",
    "only what stands in a line is blocked": "state = 0 AND visible_at IS NULL AND line IS NULL",
}
# Each finds what must not exist.
WRONG = {
    **{name: f"SELECT id FROM message WHERE {condition}" for name, condition in _NEVER.items()},
    "of each line exactly one can run": """
        SELECT sub, line FROM message WHERE line NOT NULL GROUP BY sub, line HAVING count(visible_at) <> 1""",
    "the unsettled are counted": """
        SELECT name FROM subscription AS s
        WHERE live <> (SELECT count(*) FROM message WHERE sub = s.id AND state < 2)""",
    "a history belongs to a message": "SELECT seq FROM failure WHERE seq NOT IN (SELECT seq FROM message)",
}


def test_what_is_told_after_a_commit_harms_no_neighbour(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise OSError("planted")

    async def do(broker: SQLiteBroker) -> None:
        failed, answers = await asyncio.gather(
            broker.engine.write(lambda connection: None, done=fail), broker.publish([message()]), return_exceptions=True
        )
        assert isinstance(failed, OSError)
        assert isinstance(answers, list)

    run(tmp_path / "x.db", do)


def test_a_registration_that_failed_does_not_count(tmp_path: Path) -> None:
    """With a number that was never committed two processes could hold the same lease."""

    async def do(broker: SQLiteBroker) -> None:
        connection = broker.engine.connection
        connection.execute("CREATE TRIGGER refuse BEFORE INSERT ON holder BEGIN SELECT raise(ABORT, 'planted'); END")
        with pytest.raises(BrokerUnavailable, match="planted"):
            await broker.consume("q")
        connection.execute("DROP TRIGGER refuse")
        await asyncio.gather(*(broker.consume(name) for name in ("q", "line", "all")))
        assert connection.execute("SELECT count(*) FROM holder").fetchone() == (1,)
        await broker.publish([message()])
        assert len(await (await broker.consume("q")).receive(1, 0)) == 1
        assert (
            connection.execute("SELECT lease >> 32 FROM message").fetchall()
            == connection.execute("SELECT id FROM holder").fetchall()
        )

    run(tmp_path / "x.db", do, [Subscription(name="q", pattern="q"), *SUBSCRIPTIONS[1:]])


def test_links_and_names_lead_to_the_same_holders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would look for the other's lock at the wrong place, and take it for dead."""
    (tmp_path / "link.db").symlink_to(tmp_path / "x.db")
    monkeypatch.chdir(tmp_path)
    paths = {SQLiteBroker(url).path for url in ("sqlite:///link.db", "sqlite:///x.db", f"sqlite:///{tmp_path}/./x.db")}
    assert paths == {tmp_path / "x.db"}
