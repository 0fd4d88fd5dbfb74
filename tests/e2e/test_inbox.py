"""``ctx.once`` in the transactions of every library it knows, on real databases: one effect, whatever happens."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from postroom import (
    AlreadyProcessed,
    App,
    ConfigurationError,
    Context,
    acreate_inbox,
    apurge_inbox,
    create_inbox,
    create_outbox,
    purge_inbox,
)
from postroom.message import Message, new_id
from postroom.store.inbox import inbox_stats

PAY = "UPDATE account SET amount = amount - 10"


def context(message_id: str = "") -> Context:
    return Context(Message(id=message_id or new_id(), topic="t", name="t", body=b""), "bookkeeping", 1, 5)


class Place:
    """A database with one account, and one library's way to it."""

    def __init__(self, connect: Callable[[], Any], begin: str | None = None) -> None:
        self._connect = connect
        self._begin = begin

    @contextmanager
    def connection(self) -> Iterator[Any]:
        with closing(self._connect()) as connection:
            yield connection

    def run(self, connection: Any, sql: str) -> Any:
        return connection.execute(sa.text(sql) if isinstance(connection, sa.Connection | Session) else sql)

    def begin(self, connection: Any) -> None:
        if self._begin:
            connection.execute(self._begin)

    def commit(self, connection: Any) -> None:
        connection.commit() if hasattr(connection, "commit") else connection.execute("COMMIT")

    def rollback(self, connection: Any) -> None:
        connection.rollback() if hasattr(connection, "rollback") else connection.execute("ROLLBACK")

    def set_up(self) -> None:
        with self.connection() as connection:
            self.begin(connection)
            for sql in ("DROP TABLE IF EXISTS postroom_inbox", "DROP TABLE IF EXISTS account"):
                self.run(connection, sql)
            self.run(connection, "CREATE TABLE account (amount INTEGER)")
            self.run(connection, "INSERT INTO account VALUES (100)")
            create_inbox(connection)
            create_inbox(connection)
            self.commit(connection)

    def amount(self) -> int:
        with self.connection() as connection:
            return int(self.run(connection, "SELECT amount FROM account").fetchone()[0])


def _psycopg(url: str) -> Callable[[], Any]:
    return lambda: psycopg.connect(url)


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(url, poolclass=sa.pool.NullPool)


def _alchemy(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://").replace("mysql://", "mysql+pymysql://")


def _awaited(url: str) -> str:
    return url.replace("postgresql://", "postgresql+asyncpg://").replace("mysql://", "mysql+aiomysql://")


MAKERS: dict[str, Callable[[str, Path], Place]] = {
    "sqlite3": lambda _, path: Place(lambda: sqlite3.connect(path, timeout=20)),
    "apsw": lambda _, path: Place(lambda: _patient(apsw.Connection(str(path))), "BEGIN IMMEDIATE"),
    "psycopg": lambda url, _: Place(_psycopg(url)),
    "sqlalchemy-sqlite": lambda _, path: Place(lambda: _engine(f"sqlite:///{path}").connect()),
    "sqlalchemy-postgresql": lambda url, _: Place(lambda: _engine(_alchemy(url)).connect()),
    "session-sqlite": lambda _, path: Place(lambda: Session(_engine(f"sqlite:///{path}"))),
    "sqlalchemy-mariadb": lambda url, _: Place(lambda: _engine(_alchemy(url)).connect()),
    "session-mariadb": lambda url, _: Place(lambda: Session(_engine(_alchemy(url)))),
    "session-postgresql": lambda url, _: Place(lambda: Session(_engine(_alchemy(url)))),
}


SERVERS = {"psycopg": "postgresql", "postgresql": "postgresql", "mariadb": "mariadb"}


def _patient(connection: apsw.Connection) -> apsw.Connection:
    connection.set_busy_timeout(20_000)
    return connection


@pytest.fixture(params=sorted(MAKERS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    server = next((server for word, server in SERVERS.items() if word in request.param), None)
    url = request.getfixturevalue(server) if server else ""
    made = MAKERS[request.param](url, tmp_path / "accounts.db")
    made.set_up()
    return made


def pay(place: Place, ctx: Context) -> bool:
    """The handler. Whether it had an effect."""
    with place.connection() as connection:
        place.begin(connection)
        try:
            ctx.once(connection)
        except AlreadyProcessed:
            place.rollback(connection)
            return False
        place.run(connection, PAY)
        place.commit(connection)
        return True


def test_one_effect(place: Place) -> None:
    ctx = context()
    assert [pay(place, ctx), pay(place, ctx), pay(place, context())] == [True, False, True]
    assert place.amount() == 80


def test_a_rollback_leaves_no_mark(place: Place) -> None:
    ctx = context()
    with place.connection() as connection:
        place.begin(connection)
        ctx.once(connection)
        place.run(connection, PAY)
        place.rollback(connection)
    assert place.amount() == 100
    assert pay(place, ctx)
    assert place.amount() == 90


def test_a_duplicate_leaves_the_transaction_usable(place: Place) -> None:
    ctx = context()
    pay(place, ctx)
    with place.connection() as connection:
        place.begin(connection)
        with pytest.raises(AlreadyProcessed):
            ctx.once(connection)
        place.run(connection, PAY)
        place.commit(connection)
    assert place.amount() == 80


def test_a_duplicate_has_the_result_that_was_kept(place: Place) -> None:
    ctx = context()
    with place.connection() as connection:
        place.begin(connection)
        with pytest.raises(ConfigurationError, match=r"call ctx\.once before"):
            ctx.keep_result(connection, 1)
        ctx.once(connection)
        ctx.keep_result(connection, {"paid": ["ä", None]})
        place.commit(connection)
    with place.connection() as connection:
        place.begin(connection)
        with pytest.raises(AlreadyProcessed) as processed:
            ctx.once(connection)
        place.rollback(connection)
    assert processed.value.result == {"paid": ["ä", None]}


def test_an_older_table_is_brought_up_to_date(place: Place) -> None:
    """The marks in it stay."""
    ctx = context()
    pay(place, ctx)
    with place.connection() as connection:
        place.begin(connection)
        place.run(connection, "ALTER TABLE postroom_inbox DROP COLUMN result")
        place.commit(connection)
    with place.connection() as connection:
        place.begin(connection)
        with pytest.raises(ConfigurationError, match="postroom inbox create"):
            ctx.once(connection)
        place.rollback(connection)
    with place.connection() as connection:
        place.begin(connection)
        create_inbox(connection)
        place.commit(connection)
    assert not pay(place, ctx)


def test_two_at_the_same_time_make_one_effect(place: Place) -> None:
    """The second waits for the first, and then finds its mark."""
    for _ in range(5):
        ctx, before = context(), place.amount()
        line = threading.Barrier(4)
        effects: list[bool] = []

        def handle(ctx: Context = ctx, line: threading.Barrier = line, effects: list[bool] = effects) -> None:
            line.wait(10)
            try:
                effects.append(pay(place, ctx))
            except Exception as error:
                # SQLite lets a reader that cannot become the writer fail at once; its message comes again.
                if "locked" not in str(error):
                    raise

        threads = [threading.Thread(target=handle) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert effects.count(True) == 1
        assert place.amount() == before - 10


def test_old_marks_are_purged(place: Place) -> None:
    ctx = context()
    pay(place, ctx)
    for older_than, gone in ((3600.0, 0), (-1.0, 1)):
        with place.connection() as connection:
            place.begin(connection)
            assert purge_inbox(connection, older_than) == gone
            place.commit(connection)
    assert pay(place, ctx)


def test_nobody_waits_for_a_purge(mariadb: str, postgresql: str) -> None:
    """Until it commits it holds what it deletes, and nothing else; nor does it wait for marks not yet committed."""
    for name, url, patience in (
        ("sqlalchemy-mariadb", mariadb, "SET innodb_lock_wait_timeout = 2"),
        ("sqlalchemy-postgresql", postgresql, "SET lock_timeout = '2s'"),
    ):
        place = MAKERS[name](url, Path())
        place.set_up()
        for _ in range(3):
            pay(place, context())
        with place.connection() as handling, place.connection() as purging, place.connection() as other:
            for connection in (purging, other):
                place.run(connection, patience)
                connection.commit()
            context().once(handling)
            assert purge_inbox(purging, -1.0) == 3
            context().once(other)
            for connection in (other, purging, handling):
                connection.commit()
            assert inbox_stats(other).marks == 2


def test_a_missing_table_is_told(place: Place) -> None:
    with place.connection() as connection:
        place.begin(connection)
        place.run(connection, "DROP TABLE postroom_inbox")
        place.commit(connection)
    with place.connection() as connection:
        place.begin(connection)
        with pytest.raises(ConfigurationError, match="create_inbox"):
            context().once(connection)
        place.rollback(connection)


def test_autocommit_is_refused(postgresql: str, tmp_path: Path) -> None:
    """The mark would be committed before the effect."""
    path = tmp_path / "a.db"
    engine = _engine(f"sqlite:///{path}")
    connections: list[Any] = [
        sqlite3.connect(path, isolation_level=None),
        apsw.Connection(str(path)),
        psycopg.connect(postgresql, autocommit=True),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT"),
        _engine(f"sqlite:///{path}").execution_options(isolation_level="AUTOCOMMIT").connect(),
        sa.create_engine(f"sqlite:///{path}", isolation_level="AUTOCOMMIT").connect(),
    ]
    for connection in connections:
        with closing(connection), pytest.raises(ConfigurationError, match="open a transaction"):
            context().once(connection)


def test_other_connections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"builtins\.str.*asyncpg"):
        context().once("postgresql://localhost")
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(ConfigurationError, match=r"ctx\.once"):
        asyncio.run(context().aonce(connection))


def test_a_failed_statement_is_raised_as_it_is(postgresql: str) -> None:
    """It is the library's own error, by which callers try again; and not its own cause."""
    with psycopg.connect(postgresql) as connection:
        create_inbox(connection)
        create_outbox(connection)
        connection.commit()
        app = App("memory://")
        book = app.task(name="book")(lambda: None)
        for statement in (
            lambda: context().once(connection),
            lambda: context().keep_result(connection, 1),
            lambda: inbox_stats(connection),
            lambda: book.using(transaction=connection).enqueue(),
        ):
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.execute("SELECT 1 / 0")
            with pytest.raises(psycopg.errors.InFailedSqlTransaction) as failed:
                statement()
            assert failed.value.__cause__ is not failed.value
            connection.rollback()
        app.close()


async def _apay(ctx: Context, connection: Any, execute: Callable[[str], Any]) -> bool:
    try:
        await ctx.aonce(connection)
    except AlreadyProcessed:
        return False
    await execute(PAY)
    return True


def test_psycopg_async(postgresql: str) -> None:
    MAKERS["psycopg"](postgresql, Path()).set_up()
    ctx = context()

    async def handle() -> bool:
        async with await psycopg.AsyncConnection.connect(postgresql) as connection:
            return await _apay(ctx, connection, connection.execute)

    async def main() -> list[bool]:
        async with await psycopg.AsyncConnection.connect(postgresql) as connection:
            await acreate_inbox(connection)
            assert await apurge_inbox(connection, 10.0) == 0
        return [*await asyncio.gather(handle(), handle()), await handle()]

    assert sorted(asyncio.run(main())) == [False, False, True]
    assert MAKERS["psycopg"](postgresql, Path()).amount() == 90


def test_asyncpg(postgresql: str) -> None:
    MAKERS["psycopg"](postgresql, Path()).set_up()
    ctx = context()

    async def main() -> list[bool]:
        async with asyncpg.create_pool(postgresql, min_size=1, max_size=4) as pool:

            async def handle() -> bool:
                async with pool.acquire() as connection, connection.transaction():
                    return await _apay(ctx, connection, connection.execute)

            async with pool.acquire() as connection:
                await acreate_inbox(connection)
                assert await apurge_inbox(connection, 10.0) == 0
                with pytest.raises(ConfigurationError, match="open a transaction"):
                    await ctx.aonce(connection)
            return [*await asyncio.gather(handle(), handle()), await handle()]

    assert sorted(asyncio.run(main())) == [False, False, True]
    assert MAKERS["psycopg"](postgresql, Path()).amount() == 90


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_sqlalchemy_async(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """On the event loop a second one that waits for the first must not stop it."""
    url = "" if database == "sqlite" else request.getfixturevalue(database)
    place = MAKERS[f"sqlalchemy-{database}"](url, tmp_path / "accounts.db")
    place.set_up()
    ctx = context()

    async def main() -> list[bool]:
        engine = create_async_engine(_awaited(url) if url else f"sqlite+aiosqlite:///{tmp_path}/accounts.db")

        async def with_session() -> bool:
            async with AsyncSession(engine) as session, session.begin():
                return await _apay(ctx, session, lambda sql: session.execute(sa.text(sql)))

        async def with_connection() -> bool:
            async with engine.begin() as connection:
                return await _apay(ctx, connection, lambda sql: connection.execute(sa.text(sql)))

        async with engine.begin() as connection:
            await acreate_inbox(connection)
            assert await apurge_inbox(connection, 10.0) == 0
        effects = [*await asyncio.gather(with_session(), with_connection()), await with_session()]
        await engine.dispose()
        return effects

    assert sorted(asyncio.run(main())) == [False, False, True]
    assert place.amount() == 90


DJANGO = """
import sys
import django
from django.conf import settings

settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}})
django.setup()
from django.db import connection, transaction
from postroom import AlreadyProcessed, ConfigurationError, Context, create_inbox, purge_inbox
from postroom.message import Message, new_id
from postroom.store.inbox import inbox_stats

ctx = Context(Message(id=new_id(), topic="t", name="t", body=b""), "bookkeeping", 1, 5)
with transaction.atomic():
    create_inbox(connection)
try:
    ctx.once(connection)
except ConfigurationError as error:
    print(error)
for _ in range(2):
    try:
        with transaction.atomic():
            ctx.once(connection)
            print("effect")
    except AlreadyProcessed:
        print("processed before")
with transaction.atomic():
    print(purge_inbox(connection, -1.0))
"""


def test_django(tmp_path: Path) -> None:
    """In a process of its own: its settings are global."""
    command = [sys.executable, "-c", DJANGO, str(tmp_path / "django.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused, *rest = done.stdout.splitlines() or [done.stderr]
    assert "open a transaction first" in refused, done.stderr
    assert rest == ["effect", "processed before", "1"]
