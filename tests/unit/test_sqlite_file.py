"""The file itself: what can be wrong with it, and what other connections to it may do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from postroom import App, BrokerUnavailable, ConfigurationError, JobState
from postroom.broker.base import Ack, Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker, engine, schema
from postroom.message import Message, new_id
from postroom.testing.clock import ManualClock
from tests.conftest import wait_until, working

T = TypeVar("T")


def message(**fields: Any) -> Message:
    return Message(**{"id": new_id(), "topic": "q", "name": "t", "body": b"{}", "created_at": time.time(), **fields})


def on(path: Path, do: Callable[[SQLiteBroker], Awaitable[T]], clock: ManualClock | None = None) -> T:
    """Do something with a connected broker that has the queue ``q``."""

    async def main() -> T:
        broker = SQLiteBroker(f"sqlite:///{path}", clock=clock)
        await broker.connect()
        try:
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            return await do(broker)
        finally:
            await broker.close()

    return asyncio.run(main())


async def publish(broker: SQLiteBroker) -> list[Any]:
    return list(await broker.publish([message()]))


def ready(path: Path) -> int:
    async def count(broker: SQLiteBroker) -> int:
        return (await broker.stats())[0].ready

    return on(path, count)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere does not exist"):
        on(tmp_path / "nowhere" / "x.db", publish)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite://x.db", "sqlite:///", "sqlite:///x.db?mode=ro"])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite"):
        SQLiteBroker(url)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 1000)
    with pytest.raises(ConfigurationError, match="not a SQLite database"):
        on(path, publish)
    assert path.read_text().startswith("my notes")


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(ConfigurationError, match="not of this kind"):
        on(path, publish)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    on(path, publish)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ConfigurationError, match="upgrade Postroom"):
        on(path, publish)


def test_an_older_file_migrates_forward_and_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    on(path, publish)
    newer = (*schema.MIGRATIONS, "CREATE TABLE extra (x); ALTER TABLE topic ADD COLUMN note TEXT")
    connection = sqlite3.connect(path, isolation_level=None)
    schema.prepare(connection, str(path), newer)
    schema.prepare(connection, str(path), newer)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
    assert connection.execute("SELECT count(*) FROM message").fetchone() == (1,)
    connection.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    on(path, publish)
    connection = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        schema.prepare(connection, str(path), (*schema.MIGRATIONS, "CREATE TABLE extra (x); SELECT * FROM missing"))
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'extra'").fetchone() == (0,)
    connection.close()
    assert ready(path) == 1


def test_a_damaged_file_is_reported_not_served(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    on(path, lambda broker: broker.publish([message(body=b"x" * 500) for _ in range(500)]))
    content = bytearray(path.read_bytes())
    content[4096 : len(content) - 4096] = b"\xff" * (len(content) - 8192)
    path.write_bytes(bytes(content))
    with pytest.raises(BrokerUnavailable, match="damaged"):
        on(path, publish)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    on(path, publish)
    path.chmod(0o400)
    with pytest.raises(BrokerUnavailable, match="cannot be written"):
        on(path, publish)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN IMMEDIATE")
print(flush=True)
sys.stdin.read()
"""


def test_a_lock_that_lasts_is_reported_and_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"

    async def write(broker: SQLiteBroker) -> None:
        await broker.publish([message()])
        # In another process: locks of one process do not exclude each other.
        other = subprocess.Popen(  # noqa: ASYNC220 -- nothing else runs on this loop
            [sys.executable, "-c", HOLD, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdout is not None
        other.stdout.readline()
        monkeypatch.setattr(engine, "BUSY_DEADLINE", 0.2)
        with pytest.raises(BrokerUnavailable, match="locked"):
            await broker.publish([message()])
        other.communicate()
        await broker.publish([message()])

    on(path, write)
    assert ready(path) == 2


FILL = """
import asyncio, resource, signal, sys, time
from postroom import BrokerUnavailable
from postroom.broker.base import Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import Message, new_id

async def main():
    broker = SQLiteBroker(f"sqlite:///{sys.argv[1]}")
    await broker.connect()
    await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
    stored = 0
    while True:
        batch = [Message(id=new_id(), topic="q", name="t", body=b"x" * 5000, created_at=time.time()) for _ in range(20)]
        try:
            stored += len(await broker.publish(batch))
        except BrokerUnavailable as error:
            print(stored, error, flush=True)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(len(await broker.publish(batch)), flush=True)
    await broker.close()

asyncio.run(main())
"""


def test_a_full_disk_refuses_and_heals(tmp_path: Path) -> None:
    """What was confirmed is there, what was refused is not, and once there is room it goes on."""
    path = tmp_path / "x.db"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    stored, _, text = first.partition(" ")
    assert "disk" in text
    assert int(stored) > 100
    assert ready(path) == int(stored) + int(second)


def test_two_processes_open_a_new_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    code = (
        "import sys; from postroom import App; app = App(f'sqlite:///{sys.argv[1]}')\n"
        "@app.task\ndef t() -> None: ...\n"
        "sys.stdin.readline(); t.enqueue(); app.close()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, text=True) for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 6
    with App(f"sqlite:///{path}") as app:
        assert app.stats()[0].ready == 6


def test_concurrent_publishes_share_commits(tmp_path: Path) -> None:
    async def many(broker: SQLiteBroker) -> int:
        before = broker.engine.commits
        await asyncio.gather(*(broker.publish([message()]) for _ in range(64)))
        return broker.engine.commits - before

    assert on(tmp_path / "x.db", many) <= 3


def test_one_failing_operation_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM message")
        raise OSError("no")

    async def together(broker: SQLiteBroker) -> list[Any]:
        return await asyncio.gather(
            broker.publish([message()]), broker.engine.write(fail), broker.publish([message()]), return_exceptions=True
        )

    path = tmp_path / "x.db"
    first, failed, last = on(path, together)
    assert isinstance(failed, OSError)
    assert len(first) == len(last) == 1
    assert ready(path) == 2


def test_done_jobs_do_not_make_the_file_grow(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "x.db"

    async def rounds(broker: SQLiteBroker) -> list[int]:
        sizes = []
        consumer = await broker.consume("q")
        for _ in range(6):
            await broker.publish([message(body=b"x" * 300, result_ttl=10.0) for _ in range(1000)])
            deliveries = await consumer.receive(1000, 0)
            await consumer.settle([(delivery, Ack()) for delivery in deliveries])
            await clock.advance(11.0)
            await broker._clean()
            broker.engine.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            sizes.append(path.stat().st_size)
        return sizes

    sizes = on(path, rounds, clock)
    assert max(sizes) <= sizes[0] * 1.2


def test_a_message_in_the_users_transaction_exists_if_it_commits(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with App(f"sqlite:///{path}") as app:

        @app.task
        def task(n: int) -> int:
            return n

        app.connect()
        connection = sqlite3.connect(path)
        connection.row_factory = lambda cursor, row: {"a": "dictionary"}
        connection.execute("CREATE TABLE mine (x)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO mine VALUES (1)")
        gone = task.using(transaction=connection).enqueue(1)
        connection.rollback()
        connection.execute("BEGIN")
        kept = task.using(transaction=connection).enqueue(2)
        with working(app):
            with pytest.raises(Exception, match="no job"):
                kept.status()
            connection.commit()
            committed_at = time.monotonic()
            assert kept.result(timeout=10) == 2
            assert time.monotonic() - committed_at < 2
        with pytest.raises(Exception, match="no job"):
            gone.status()
        connection.close()


def test_a_transaction_must_be_open_and_on_the_same_file(tmp_path: Path) -> None:
    with App(f"sqlite:///{tmp_path}/x.db") as app:

        @app.task
        def task() -> None: ...

        app.connect()
        for connection, text in (
            (sqlite3.connect(tmp_path / "x.db"), "no transaction is open"),
            (sqlite3.connect(tmp_path / "other.db"), "create_outbox"),
            (sqlite3.connect(":memory:"), "create_outbox"),
            ("postgresql://", "sqlite3.Connection"),
        ):
            with pytest.raises(ConfigurationError, match=text):
                task.using(transaction=connection).enqueue()
            if isinstance(connection, sqlite3.Connection):
                connection.close()


def test_a_publish_in_another_process_wakes_a_waiting_worker(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    code = (
        "import sys; from postroom import App; app = App(f'sqlite:///{sys.argv[1]}')\n"
        "@app.task\ndef task() -> None: ...\n"
        "app.connect()\n"
        "for line in sys.stdin: print(task.enqueue().id, flush=True)"
    )
    started: dict[str, float] = {}
    with App(f"sqlite:///{path}") as app:

        @app.task
        def task() -> None: ...

        @app.middleware
        async def note(ctx: Any, call_next: Any) -> Any:
            started[ctx.job_id] = time.monotonic()
            return await call_next()

        other = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdin is not None
        assert other.stdout is not None
        delays = []
        with working(app):
            for _ in range(15):
                other.stdin.write("\n")
                other.stdin.flush()
                job_id = other.stdout.readline().strip()
                confirmed = time.monotonic()
                delays.append(wait_until(lambda job_id=job_id: started.get(job_id), "it starts") - confirmed)
        other.communicate()
    # Half a second is the look that happens anyhow: most must come long before.
    assert sorted(delays)[len(delays) // 2] < 0.1


def test_the_wall_clock_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I27: an hour forwards neither ends leases nor makes delayed messages early; nor does one backwards delay them."""
    path = tmp_path / "x.db"
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])

    async def scenario(broker: SQLiteBroker) -> None:
        consumer = await broker.consume("q", lease=60.0)
        await broker.publish([message(), message(not_before=time.time() + 60.0)])
        (held,) = await consumer.receive(10, 0)
        for jump[0] in (3600.0, -3600.0):
            assert await consumer.receive(10, 0) == []
        assert await consumer.settle([(held, Ack())]) == [None]
        jump[0] = -3600.0
        await broker.publish([message()])
        assert len(await consumer.receive(10, 0)) == 1

    on(path, scenario)


def test_a_thread_pool_of_producers_uses_one_connection(tmp_path: Path) -> None:
    with App(f"sqlite:///{tmp_path}/x.db") as app:

        @app.task
        def task() -> None: ...

        threads = [threading.Thread(target=lambda: [task.enqueue() for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert app.stats()[0].ready == 160
        assert task.enqueue().status().state is JobState.READY
