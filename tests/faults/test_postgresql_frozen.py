"""A worker frozen in its handlers past its lease, while another does their work: thawed, it has no second effect."""

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
from tests.faults import frozen
from tests.faults.processes import ROOT
from tests.servers import url_of
from tests.transactions import ASYNC, SYNC, database_of, engine_of

PAIRS = [(way, step) for way in (*SYNC, *ASYNC) for step in frozen.STEPS]
KEEPS_ITS_LOCK = [(way, step) for way, step in PAIRS if database_of(way) == "sqlite" and step == frozen.AFTER]
"""No server ends the transaction of the frozen one; whoever wants to write is refused until it thaws."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_frozen_in_the_handler(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C5, C12, for each kind of connection; with the mark not yet written, and written but not committed."""
    monkeypatch.setenv("SHOP_FOLDER", str(tmp_path))
    monkeypatch.setenv("SHOP_BROKER", f"sqlite:///{tmp_path}/broker.db")
    with url_of("postgresql", tmp_path_factory) as postgresql, url_of("mariadb", tmp_path_factory) as mariadb:
        monkeypatch.setenv("SHOP_POSTGRESQL", postgresql)
        monkeypatch.setenv("SHOP_MYSQL", mariadb)
        set_up()
        with App(os.environ["SHOP_BROKER"]) as app, worker(tmp_path) as first:
            jobs = enqueue(app)
            wait_until(lambda: len(list(tmp_path.glob("*.there"))) == len(PAIRS), "all are half-way", 60)
            first.send_signal(signal.SIGSTOP)
            with worker(tmp_path) as second:
                free = [pair for pair in PAIRS if pair not in KEEPS_ITS_LOCK]
                for pair in free:
                    assert jobs[pair].result(60), pair
                assert {pair: amount(*pair) for pair in free} == dict.fromkeys(free, 90)
                (tmp_path / "thawed").touch()
                first.send_signal(signal.SIGCONT)
                wait_until(lambda: len(list(tmp_path.glob("*.ended"))) == len(PAIRS), "the thawed have ended", 60)
                for pair in KEEPS_ITS_LOCK:
                    jobs[pair].result(60)
                for process in (first, second):
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(40) == 0, (tmp_path / "log").read_text()
            assert {pair: amount(*pair) for pair in PAIRS} == dict.fromkeys(PAIRS, 90)
            assert {job.status().state for job in jobs.values()} == {JobState.SUCCEEDED}


def enqueue(app: App) -> dict[tuple[str, str], Job]:
    @app.task
    def pay(way: str, step: str) -> int: ...

    @app.task
    def apay(way: str, step: str) -> int: ...

    return {(way, step): (pay if way in SYNC else apay).enqueue(way, step) for way, step in PAIRS}


@contextmanager
def worker(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = "from tests.faults.frozen import app; app.run_worker(concurrency=60)"
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
