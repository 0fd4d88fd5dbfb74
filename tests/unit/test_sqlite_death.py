"""Workers of the SQLite broker that die, freeze, or cannot say goodbye."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postroom import BrokerUnavailable
from postroom.broker.base import Ack, Delivery, Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker, engine, holders
from postroom.message import Message, new_id

pytestmark = pytest.mark.skipif(not holders.SUPPORTED, reason="this system has no POSIX file locks")

HOLD = """
import asyncio, sys
from postroom.broker.sqlite import SQLiteBroker
from postroom.errors import SettlementError
from postroom.broker.base import Ack

async def main():
    broker = SQLiteBroker(f"sqlite:///{sys.argv[1]}")
    await broker.connect()
    consumer = await broker.consume("q", lease=float(sys.argv[2]))
    deliveries = await consumer.receive(10, 10)
    consumer.started([delivery for delivery in deliveries if delivery.message.name == "started"])
    print(len(deliveries), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    errors = await consumer.settle([(delivery, Ack()) for delivery in deliveries])
    print(*sorted(type(error).__name__ for error in errors), flush=True)

asyncio.run(main())
"""


def run(path: Path, do: Callable[[SQLiteBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        broker = SQLiteBroker(f"sqlite:///{path}")
        await broker.connect()
        try:
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            await do(broker)
        finally:
            await broker.close()

    asyncio.run(main())


async def publish(broker: SQLiteBroker, *names: str) -> None:
    now = time.time()
    await broker.publish([Message(id=new_id(), topic="q", name=name, body=b"{}", created_at=now) for name in names])


@pytest.fixture
def start() -> Iterator[Callable[[Path, float], subprocess.Popen[str]]]:
    """Starts a process that holds all of the queue under a lease of so many seconds, and waits until it does."""
    started: list[subprocess.Popen[str]] = []

    def hold(path: Path, lease: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(path), str(lease)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "2"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


async def take_two(broker: SQLiteBroker) -> dict[str, Delivery]:
    """Both messages, each by a consumer of its own, within ten seconds."""
    found: list[Delivery] = []
    while len(found) < 2:
        more = await (await broker.consume("q")).receive(2, 10)
        assert more, "they did not come back"
        found += more
    return {delivery.message.name: delivery for delivery in found}


async def check_history(broker: SQLiteBroker, found: dict[str, Delivery], pid: int) -> None:
    started, claimed = found["started"], found["claimed"]
    assert (started.attempt, started.suspect) == (2, True)
    assert (claimed.attempt, claimed.suspect) == (1, False)
    (record,) = await broker.jobs.get(started.message.id)
    assert [failure.reason for failure in record.failures] == ["worker_lost"]
    assert record.failures[0].worker.endswith(f":{pid}")
    (record,) = await broker.jobs.get(claimed.message.id)
    assert record.failures == ()


def test_what_a_killed_process_held_comes_back_within_a_second(tmp_path: Path, start: Any) -> None:
    """C4: only what it had started counts as failed; the lease of ten minutes is not waited for."""

    async def do(broker: SQLiteBroker) -> None:
        await publish(broker, "started", "claimed")
        process = start(broker.path, 600.0)
        consumer = await broker.consume("q")
        waiting = asyncio.ensure_future(consumer.receive(1, 10))
        await asyncio.sleep(0)
        process.kill()
        killed_at = time.monotonic()
        first = await waiting
        assert time.monotonic() - killed_at < 1.5
        found = {first[0].message.name: first[0]}
        rest = await consumer.receive(1, 0) or await (await broker.consume("q")).receive(1, 0)
        found[rest[0].message.name] = rest[0]
        await check_history(broker, found, process.pid)

    run(tmp_path / "x.db", do)


def test_two_who_notice_a_death_count_it_once(tmp_path: Path, start: Any) -> None:
    async def do(broker: SQLiteBroker) -> None:
        await publish(broker, "started", "claimed")
        process = start(broker.path, 600.0)
        process.kill()
        process.wait()
        other = SQLiteBroker(f"sqlite:///{broker.path}")
        await other.connect()
        for one in (broker, other):
            await one.consume("q")
        # Both have seen it dead before either has done anything about it.
        seen = [one.holders.dead(one.engine.connection) for one in (broker, other)]
        assert [len(dead) for dead in seen] == [1, 1]
        for one, (number,) in zip((broker, other), seen, strict=True):
            await one.engine.write(
                lambda connection, one=one, number=number: one.holders.recover(connection, number, 1.0)
            )  # type: ignore[misc]
        await check_history(broker, await take_two(broker), process.pid)
        await other.close()

    run(tmp_path / "x.db", do)


def test_a_frozen_process_loses_what_it_holds_when_its_lease_ends(tmp_path: Path, start: Any) -> None:
    """C5: its lock is still held, its notes are read all the same; thawed, it settles nothing."""

    async def do(broker: SQLiteBroker) -> None:
        await publish(broker, "started", "claimed")
        process = start(broker.path, 1.0)
        os.kill(process.pid, signal.SIGSTOP)
        found = await take_two(broker)
        await check_history(broker, found, process.pid)
        os.kill(process.pid, signal.SIGCONT)
        told, _ = await asyncio.to_thread(process.communicate, "\n")
        assert told.split() == ["LeaseLost", "LeaseLost"]
        records = [(await broker.jobs.get(delivery.message.id))[0] for delivery in found.values()]
        assert {record.finished_at for record in records} == {None}

    run(tmp_path / "x.db", do)


def test_a_close_that_cannot_write_leaves_its_notes_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def do(broker: SQLiteBroker) -> None:
        await publish(broker, "started", "claimed")
        closing = SQLiteBroker(f"sqlite:///{broker.path}")
        await closing.connect()
        consumer = await closing.consume("q", lease=600.0)
        deliveries = await consumer.receive(10, 0)
        consumer.started([delivery for delivery in deliveries if delivery.message.name == "started"])
        blocker = sqlite3.connect(broker.path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(engine, "BUSY_DEADLINE", 0.05)
        with pytest.raises(BrokerUnavailable, match="locked"):
            await closing.close()
        blocker.execute("ROLLBACK")
        blocker.close()
        monkeypatch.undo()
        await closing.close()
        await check_history(broker, await take_two(broker), os.getpid())

    run(tmp_path / "x.db", do)


def test_looking_for_the_dead_goes_on_after_an_error(
    tmp_path: Path, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def do(broker: SQLiteBroker) -> None:
        await publish(broker, "started", "claimed")
        process = start(broker.path, 600.0)
        consumer = await broker.consume("q")
        (journal,) = [path for path in holders_of(broker.path) if path != broker.holders.journal.path]
        aside = journal.rename(journal.with_suffix(".aside"))
        journal.mkdir()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while "cannot look after" not in caplog.text:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        journal.rmdir()
        aside.rename(journal)
        deliveries = await consumer.receive(10, 10)
        await consumer.settle([(delivery, Ack()) for delivery in deliveries])

    run(tmp_path / "x.db", do)


def test_somebody_elses_lock_that_cannot_be_opened_is_a_living_ones(tmp_path: Path) -> None:
    journal = holders.Journal(tmp_path / "holders")
    journal.close(keep=True)
    assert holders.is_dead(journal.path)
    holders.lock_of(journal.path).unlink()
    holders.lock_of(journal.path).mkdir()
    assert not holders.is_dead(journal.path)


def holders_of(database: Path) -> list[Path]:
    return [path for path in Path(f"{database}.holders").iterdir() if not path.suffix]
