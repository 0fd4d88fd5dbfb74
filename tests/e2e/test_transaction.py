"""``@app.task(transaction=…)`` with everything it takes, on real databases: mark, effect and result are one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import apsw
import asyncpg
import psycopg
import psycopg_pool
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker
from tests.conftest import wait_until, working

from postroom import INJECTED, App, ConfigurationError, JobFailed, RetryPolicy, create_inbox, create_outbox, purge_inbox
from postroom.store.outbox.relay import Relay

PAY = "UPDATE account SET amount = amount - 10"
ONCE = RetryPolicy(max_attempts=1)


def _engine(url: str, **options: Any) -> sa.Engine:
    url = url.replace("postgresql:", "postgresql+psycopg:").replace("mysql:", "mysql+pymysql:")
    return sa.create_engine(url, poolclass=sa.pool.NullPool, **options)


def _async_engine(url: str) -> AsyncEngine:
    for plain, driven in (("postgresql:", "postgresql+asyncpg:"), ("mysql:", "mysql+aiomysql:")):
        url = url.replace(plain, driven)
    return create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"), poolclass=sa.pool.NullPool)


def _path(url: str) -> str:
    return url.removeprefix("sqlite:///")


def _pool(app: App, url: str) -> Any:
    @app.resource
    async def pool() -> AsyncIterator[asyncpg.Pool]:
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as opened:
            yield opened

    return asyncpg.Pool


def _psycopg_pool(app: App, url: str) -> Any:
    @app.resource
    def pool() -> Iterator[psycopg_pool.ConnectionPool]:
        with psycopg_pool.ConnectionPool(url, min_size=1, max_size=4) as opened:
            yield opened

    return psycopg_pool.ConnectionPool


def _own_transaction(url: str) -> Callable[[], Any]:
    @contextmanager
    def begin() -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(_path(url))) as connection, connection:
            yield connection

    return begin


Make = Callable[[App, str], Any]
SYNC: dict[str, tuple[str, type, Make]] = {
    "sqlite3": ("sqlite", sqlite3.Connection, lambda _, url: lambda: sqlite3.connect(_path(url))),
    "sqlite3-alone": (
        "sqlite",
        sqlite3.Connection,
        lambda _, url: lambda: sqlite3.connect(_path(url), isolation_level=None),
    ),
    "context-manager": ("sqlite", sqlite3.Connection, lambda _, url: _own_transaction(url)),
    "apsw": ("sqlite", apsw.Connection, lambda _, url: lambda: apsw.Connection(_path(url))),
    "psycopg": ("postgresql", psycopg.Connection, lambda _, url: lambda: psycopg.connect(url)),
    "psycopg-pool": ("postgresql", psycopg.Connection, _psycopg_pool),
    "engine-sqlite": ("sqlite", sa.Connection, lambda _, url: _engine(url)),
    "engine-postgresql": ("postgresql", sa.Connection, lambda _, url: _engine(url)),
    "engine-mariadb": ("mariadb", sa.Connection, lambda _, url: _engine(url)),
    "session-postgresql": ("postgresql", Session, lambda _, url: sessionmaker(_engine(url))),
    "session-mariadb": ("mariadb", Session, lambda _, url: sessionmaker(_engine(url))),
    "session-factory": ("sqlite", Session, lambda _, url: lambda: Session(_engine(url))),
}
ASYNC: dict[str, tuple[str, type, Make]] = {
    "asyncpg-pool": ("postgresql", asyncpg.Connection, _pool),
    "asyncpg": ("postgresql", asyncpg.Connection, lambda _, url: lambda: asyncpg.connect(url)),
    "psycopg-async": (
        "postgresql",
        psycopg.AsyncConnection,
        lambda _, url: lambda: psycopg.AsyncConnection.connect(url),
    ),
    "async-engine": ("postgresql", AsyncConnection, lambda _, url: _async_engine(url)),
    "async-engine-mariadb": ("mariadb", AsyncConnection, lambda _, url: _async_engine(url)),
    "async-session": ("postgresql", AsyncSession, lambda _, url: async_sessionmaker(_async_engine(url))),
    "async-session-mariadb": ("mariadb", AsyncSession, lambda _, url: async_sessionmaker(_async_engine(url))),
    "async-session-sqlite": ("sqlite", AsyncSession, lambda _, url: async_sessionmaker(_async_engine(url))),
}


class Shop:
    """An app whose one subscription pays, and the account it pays from."""

    def __init__(self, app: App, name: str, url: str) -> None:
        kind, make = (SYNC | ASYNC)[name][1:]
        self.app = app
        self.engine = _engine(url)
        self.runs = 0
        self.fails = False
        self.payments = app.topic("payment", int)
        source = make(app, url)
        text = sa.text if "sqlalchemy" in kind.__module__ else str
        shop = self

        def pay(event: int, connection: Any = INJECTED) -> dict[str, int]:
            shop.runs += 1
            connection.execute(text(PAY))
            return shop.answer(event)

        async def apay(event: int, connection: Any = INJECTED) -> dict[str, int]:
            shop.runs += 1
            await connection.execute(text(PAY))
            return shop.answer(event)

        function: Any = apay if name in ASYNC else pay
        function.__annotations__["connection"] = kind
        self.payments.subscribe("bookkeeping", transaction=source, retry=ONCE)(function)

    def answer(self, event: int) -> dict[str, int]:
        if self.fails:
            raise ValueError("after the effect")
        return {"paid": event}

    def amount(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(sa.text("SELECT amount FROM account")).scalar_one())


def set_up(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for table in ("postroom_inbox", "postroom_outbox", "postroom_outbox_leader", "account"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(sa.text("CREATE TABLE account (amount INTEGER)"))
        connection.execute(sa.text("INSERT INTO account VALUES (100)"))
        create_inbox(connection)
        create_outbox(connection)


def database(request: pytest.FixtureRequest, name: str, folder: Path) -> str:
    url = f"sqlite:///{folder}/shop.db" if name == "sqlite" else str(request.getfixturevalue(name))
    set_up(_engine(url))
    return url


@pytest.fixture
def memory() -> Iterator[App]:
    with App(f"memory://{uuid4().hex}") as app:
        yield app


@pytest.mark.parametrize("name", [*SYNC, *ASYNC])
def test_a_duplicate_does_not_run_and_has_the_first_result(
    name: str, memory: App, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shop = Shop(memory, name, database(request, (SYNC | ASYNC)[name][0], tmp_path))
    with working(memory):
        job = shop.payments.publish(7)
        assert (job.result(20), shop.runs, shop.amount()) == ({"paid": 7}, 1, 90)
        assert memory.replay("bookkeeping") == 1
        assert (job.result(20), shop.runs, shop.amount()) == ({"paid": 7}, 1, 90)


def test_what_comes_after_its_mark_was_purged_is_handled_again(
    memory: App, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Marks must be kept for longer than messages can come again: here an event is replayed too late."""
    shop = Shop(memory, "engine-sqlite", database(request, "sqlite", tmp_path))
    with working(memory):
        job = shop.payments.publish(7)
        assert job.result(20) == {"paid": 7}
        for older_than, amount in ((60.0, 90), (-1.0, 80)):
            with shop.engine.begin() as connection:
                purge_inbox(connection, older_than)
            assert memory.replay("bookkeeping") == 1
            wait_until(lambda: all(stats.ready + stats.running == 0 for stats in memory.stats()), "it was handled")
            assert shop.amount() == amount
        assert shop.runs == 2


@pytest.mark.parametrize("name", [*SYNC, *ASYNC])
def test_a_failure_leaves_nothing(name: str, memory: App, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shop = Shop(memory, name, database(request, (SYNC | ASYNC)[name][0], tmp_path))
    shop.fails = True
    with working(memory):
        job = shop.payments.publish(7)
        with pytest.raises(JobFailed, match="after the effect"):
            job.result(20)
        assert (shop.runs, shop.amount()) == (1, 100)
        shop.fails = False
        memory.dead_letters("bookkeeping").redrive(job.id)
        assert (job.result(20), shop.runs, shop.amount()) == ({"paid": 7}, 2, 90)


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mariadb"])
def test_what_is_enqueued_inside_commits_with_it(
    name: str, memory: App, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = database(request, name, tmp_path)

    @memory.task(queue="mail")
    def tell(text: str) -> None: ...

    @memory.task(transaction=_engine(url), retry=ONCE)
    def pay(fails: bool, connection: sa.Connection = INJECTED) -> None:
        tell.using(transaction=connection).enqueue("paid")
        if fails:
            raise ValueError

    with working(memory, queues=["default"]):
        for fails in (True, False):
            job = pay.enqueue(fails)
            wait_until(lambda job=job: job.status().state.final, "it ended")
    relay = Relay(url, memory.outlet.send)
    assert relay.run_once() == 1
    relay.close()


def test_a_result_that_cannot_be_kept_leaves_no_effect(memory: App, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    set_up(_engine(url))

    @memory.task(transaction=_engine(url))
    def pay(connection: sa.Connection = INJECTED) -> Any:
        connection.execute(sa.text(PAY))
        return object()

    with working(memory), pytest.raises(JobFailed, match=r"nothing was committed.*result"):
        pay.enqueue().result(20)
    with _engine(url).connect() as connection:
        assert connection.execute(sa.text("SELECT amount FROM account")).scalar_one() == 100


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """The child opens the transaction, in a thread as a worker does: on an event loop Django's ORM would refuse."""
    url = f"sqlite:///{tmp_path}/shop.db"
    set_up(_engine(url))
    (tmp_path / "shop.py").write_text(
        f"""
import asyncio, sqlite3
from postroom import INJECTED, App
app = App("sqlite:///broker.db")

@app.task(transaction=lambda: sqlite3.connect("shop.db"), isolation="process")
def pay(connection: sqlite3.Connection = INJECTED) -> int:
    asyncio.run(asyncio.sleep(0))
    return connection.execute("{PAY}").rowcount

if __name__ == "__main__":
    job = pay.enqueue()
    app.run_worker(drain=True)
    print(job.result(1))
"""
    )
    done = subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    with _engine(url).connect() as connection:
        assert connection.execute(sa.text("SELECT amount FROM account")).scalar_one() == 90


def test_what_cannot_open_a_transaction_is_refused(memory: App) -> None:
    def define(source: Any, function: Any, **annotations: Any) -> None:
        app = App(f"memory://{uuid4().hex}")
        function.__annotations__ = annotations
        app.task(transaction=source)(function)
        app.check()

    def sync(connection: Any = INJECTED) -> None: ...
    async def coroutine(connection: Any = INJECTED) -> None: ...

    for source, function, kind, words in (
        ("sqlite:///shop.db", sync, sa.Connection, "give an engine"),
        (sa.Engine, sync, sa.Connection, "no resource of this type"),
        (dict, sync, sa.Connection, "give an engine"),
        (_engine("sqlite://"), coroutine, AsyncConnection, "for sync handlers"),
        (_async_engine("postgresql://x"), sync, sa.Connection, "for async handlers"),
        (lambda: None, sync, AsyncSession, "for async handlers"),
        (_engine("sqlite://"), sync, Path, "to be injected"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            define(source, function, connection=kind)


def test_what_opens_something_else_is_told(memory: App) -> None:
    @memory.task(transaction=lambda: 42, retry=ONCE)
    def pay() -> None: ...

    @memory.task(transaction=lambda: sqlite3.connect(":memory:"), retry=ONCE)
    async def apay() -> None: ...

    with working(memory):
        with pytest.raises(JobFailed, match=r"builtins\.int, which is not for a sync handler"):
            pay.enqueue().result(20)
        with pytest.raises(JobFailed, match=r"sqlite3\.Connection, which is not for an async handler"):
            apay.enqueue().result(20)


DJANGO = """
import sys
import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "OPTIONS": {"timeout": 20}}}
)
django.setup()
from django.db import connection, transaction
from postroom import App, create_inbox

with transaction.atomic(), connection.cursor() as cursor:
    cursor.execute("CREATE TABLE account (amount INTEGER)")
    cursor.execute("INSERT INTO account VALUES (100)")
    create_inbox(connection)

app = App("memory://shop")
payments = app.topic("payment", int)

@payments.subscribe("bookkeeping", transaction=connection)
def pay(event: int) -> int:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE account SET amount = amount - 10")
    print("effect")
    return event

job = payments.publish(7)
app.run_worker(drain=True)
app.replay("bookkeeping")
app.run_worker(drain=True)
with connection.cursor() as cursor:
    print(job.result(1), cursor.execute("SELECT amount FROM account").fetchone())
"""


def test_django(tmp_path: Path) -> None:
    """In a process of its own: its settings are global."""
    command = [sys.executable, "-c", DJANGO, str(tmp_path / "django.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["effect", "7 (90,)"], done.stderr
