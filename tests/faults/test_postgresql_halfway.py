"""A worker is killed, or frozen past its lease, in handlers that are half-way: each pays once, by any connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from postroom import App, create_inbox
from postroom.message import JobState
from postroom.producer.job import Job
from tests.conftest import wait_until
from tests.faults import halfway
from tests.faults.processes import ROOT
from tests.servers import url_of
from tests.transactions import ASYNC, SYNC, database_of, engine_of

PAIRS = [(way, step) for way in (*SYNC, *ASYNC) for step in halfway.STEPS]
KEEPS_ITS_LOCK = [(way, step) for way, step in PAIRS if database_of(way) == "sqlite" and step == halfway.AFTER]
"""No server ends the transaction of the frozen one; whoever wants to write is refused until it thaws."""

PATIENCE = 120.0
"""Seconds: a worker of all these libraries starts a child that imports them too, and on a loaded machine slowly."""
Jobs = dict[tuple[str, str], Job]


@pytest.fixture
def place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose databases are set up, as the environment says."""
    with (
        url_of("postgresql", tmp_path_factory) as postgresql,
        url_of("mariadb", tmp_path_factory) as mariadb,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("SHOP_FOLDER", str(tmp_path))
        environment.setenv("SHOP_BROKER", f"sqlite:///{tmp_path}/broker.db")
        environment.setenv("SHOP_POSTGRESQL", postgresql)
        environment.setenv("SHOP_MYSQL", mariadb)
        set_up()
        yield tmp_path


@pytest.fixture
def jobs(place: Path) -> Iterator[Jobs]:
    with App(os.environ["SHOP_BROKER"]) as app:
        yield enqueue(app)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed(place: Path, jobs: Jobs) -> None:
    """C4, C12: whatever was done and not committed is undone, and done by the next; what was committed stays."""
    with worker(place) as first:
        wait_until(lambda: count(place, "there") == len(PAIRS), "all are half-way", PATIENCE)
        first.kill()
    with worker(place) as second:
        for pair in PAIRS:
            # What had committed comes again, and its handler is told; the first one's result died with it.
            assert (jobs[pair].result(PATIENCE) is None) == (pair[1] == halfway.COMMITTED), pair
        assert {pair: job.status().attempt for pair, job in jobs.items()} == dict.fromkeys(PAIRS, 2)
        stop(second)
    assert {pair: amount(*pair) for pair in PAIRS} == dict.fromkeys(PAIRS, 90)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_frozen(place: Path, jobs: Jobs) -> None:
    """C5, C12: frozen past its lease, another does all that; thawed, it has no second effect."""
    with worker(place) as first:
        wait_until(lambda: count(place, "there") == len(PAIRS), "all are half-way", PATIENCE)
        first.send_signal(signal.SIGSTOP)
        with worker(place) as second:
            free = [pair for pair in PAIRS if pair not in KEEPS_ITS_LOCK]
            for pair in free:
                assert (jobs[pair].result(PATIENCE) is None) == (pair[1] == halfway.COMMITTED), pair
            assert {pair: amount(*pair) for pair in free} == dict.fromkeys(free, 90)
            (place / "thawed").touch()
            first.send_signal(signal.SIGCONT)
            wait_until(lambda: count(place, "ended") == len(PAIRS), "the thawed have ended", PATIENCE)
            for pair in KEEPS_ITS_LOCK:
                jobs[pair].result(PATIENCE)
            stop(first, second)
    assert {pair: amount(*pair) for pair in PAIRS} == dict.fromkeys(PAIRS, 90)
    assert {job.status().state for job in jobs.values()} == {JobState.SUCCEEDED}


def count(place: Path, suffix: str) -> int:
    return len(list(place.glob(f"*.{suffix}")))


def stop(*workers: subprocess.Popen[bytes]) -> None:
    for process in workers:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(40) for process in workers] == [0] * len(workers)


def enqueue(app: App) -> Jobs:
    @app.task
    def pay(way: str, step: str) -> int: ...

    @app.task
    def apay(way: str, step: str) -> int: ...

    return {(way, step): (pay if way in SYNC else apay).enqueue(way, step) for way, step in PAIRS}


@contextmanager
def worker(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = "from tests.faults.halfway import app; app.run_worker(concurrency=60)"
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def set_up() -> None:
    clean = set()
    for way, step in PAIRS:
        engine = engine_of(way, step)
        with engine.begin() as connection:
            if engine.url not in clean:
                for table in ("account", "postroom_inbox"):
                    connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
                connection.execute(sa.text("CREATE TABLE account (name VARCHAR(100) PRIMARY KEY, amount INTEGER)"))
                create_inbox(connection)
                clean.add(engine.url)
            connection.execute(sa.text(f"INSERT INTO account VALUES ('{way} {step}', 100)"))
        if engine.dialect.name == "sqlite":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("PRAGMA journal_mode = WAL"))


def amount(way: str, step: str) -> int:
    with engine_of(way, step).connect() as connection:
        return int(connection.execute(sa.text(f"SELECT amount FROM account WHERE name = '{way} {step}'")).scalar_one())
