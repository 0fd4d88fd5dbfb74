"""A worker is killed at every step between a message and the end of its effect: the balance is right each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from postroom import App, create_inbox
from tests.servers import url_of

STEPS = ("before the handler", "after the effect", "after the commit", "after the ack")

SHOP = """
import os, signal, sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
import asyncpg, psycopg
import sqlalchemy as sa
from postroom import INJECTED, App
from postroom.broker.sqlite.consumer import SQLiteConsumer

URL = os.environ["SHOP_DATABASE"]
PAY = "UPDATE account SET amount = amount - 10"
app = App("sqlite:///broker.db")

def die_once(step):
    mark = Path(f"died {step}")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

@app.middleware
async def around(ctx, call_next):
    step = ctx.message.headers["step"]
    if step == "before the handler":
        die_once(step)
    result = await call_next()
    if step == "after the commit":
        die_once(step)
    return result

settle = SQLiteConsumer.settle
async def settle_and_die(self, settlements):
    errors = await settle(self, settlements)
    for delivery, _ in settlements:
        if delivery.message.headers["step"] == "after the ack":
            die_once("after the ack")
    return errors
SQLiteConsumer.settle = settle_and_die
"""
SYNC = """
@app.task(transaction={transaction})
def pay(step: str, connection: {kind} = INJECTED) -> str:
    connection.execute({pay})
    if step == "after the effect":
        die_once(step)
    return step
"""
ASYNC = SYNC.replace("def pay", "async def pay").replace("    connection.ex", "    await connection.ex")
ENGINE = "sa.create_engine(URL.replace('postgresql:', 'postgresql+psycopg:').replace('mysql:', 'mysql+pymysql:'))"
WAYS = {
    "sqlite3": ("sqlite", SYNC.format(
        transaction="lambda: sqlite3.connect('shop.db')", kind="sqlite3.Connection", pay="PAY")),
    "sqlalchemy-mariadb": ("mariadb", SYNC.format(transaction=ENGINE, kind="sa.Connection", pay="sa.text(PAY)")),
    "sqlalchemy-postgresql": ("postgresql", SYNC.format(transaction=ENGINE, kind="sa.Connection", pay="sa.text(PAY)")),
    "psycopg": ("postgresql", SYNC.format(
        transaction="lambda: psycopg.connect(URL)", kind="psycopg.Connection", pay="PAY")),
    "asyncpg": ("postgresql", ASYNC.format(
        transaction="lambda: asyncpg.connect(URL)", kind="asyncpg.Connection", pay="PAY")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_every_step(way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    server, task = WAYS[way]
    if server == "sqlite":
        run(tmp_path, f"sqlite:///{tmp_path}/shop.db", task)
        return
    with url_of(server, tmp_path_factory) as url:
        run(tmp_path, url, task)


def run(folder: Path, url: str, task: str) -> None:
    engine = sa.create_engine(
        url.replace("postgresql:", "postgresql+psycopg:").replace("mysql:", "mysql+pymysql:"),
        poolclass=sa.pool.NullPool,
    )
    with engine.begin() as connection:
        for table in ("account", "postroom_inbox"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(sa.text("CREATE TABLE account (amount INTEGER)"))
        connection.execute(sa.text("INSERT INTO account VALUES (100)"))
        create_inbox(connection)
    (folder / "shop.py").write_text(SHOP + task)
    with App(f"sqlite:///{folder}/broker.db") as app:

        @app.task
        def pay(step: str) -> str:
            return step

        jobs = [pay.using(headers={"step": step}).enqueue(step) for step in STEPS]
        ends = [work(folder, url) for _ in range(len(STEPS) + 1)]
        assert sorted(ends) == [-9] * len(STEPS) + [0], (folder / "log").read_text()
        assert [job.result(20) for job in jobs] == list(STEPS)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT amount FROM account")).scalar_one() == 60


def work(folder: Path, url: str) -> int:
    """One worker process, until it is killed or nothing is left to do."""
    command = "from shop import app; app.run_worker(concurrency=1, drain=True)"
    with open(folder / "log", "ab") as log:
        return subprocess.run(
            [sys.executable, "-c", command],
            cwd=folder,
            env={**os.environ, "SHOP_DATABASE": url},
            stdout=log,
            stderr=log,
            check=False,
            timeout=60,
        ).returncode
