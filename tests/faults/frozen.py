"""A handler for each kind of connection, which pays once. Its first attempt stops half-way: there it is frozen."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from postroom import INJECTED, App, Context, RetryPolicy

BEFORE, AFTER = STEPS = ("before the mark", "after the effect")
LEASE = 1.0
_DRIVERS = {"sqlite": "", "postgresql": "+psycopg", "mysql": "+pymysql"}
_ASYNC_DRIVERS = {"sqlite": "+aiosqlite", "postgresql": "+asyncpg", "mysql": "+aiomysql"}
_GIVE_UP = {
    "postgresql": "SET idle_in_transaction_session_timeout = '500ms'",
    "mysql": "SET SESSION idle_transaction_timeout = 1",
}
"""The server ends the transaction of a client that has gone silent, and with it its locks; SQLite has no server."""


def folder() -> Path:
    return Path(os.environ["FROZEN_FOLDER"])


def database_of(way: str) -> str:
    """``sqlite``, ``postgresql`` or ``mysql``."""
    return {"sqlite3": "sqlite", "apsw": "sqlite"}.get(way) or way.rpartition("-")[2]


def url(way: str, step: str) -> sa.URL:
    # SQLite locks whole files, so each pair has its own.
    lite = f"sqlite:///{folder()}/{way} {step}.db"
    return sa.make_url(os.environ.get(f"FROZEN_{database_of(way).upper()}", lite))


def engine(way: str, step: str) -> sa.Engine:
    return sa.create_engine(_driven(url(way, step), _DRIVERS), **_options(way))


def async_engine(way: str, step: str) -> AsyncEngine:
    return create_async_engine(_driven(url(way, step), _ASYNC_DRIVERS), **_options(way))


def _driven(plain: sa.URL, drivers: dict[str, str]) -> sa.URL:
    return plain.set(drivername=plain.drivername + drivers[plain.drivername])


def _options(way: str) -> dict[str, Any]:
    patience = {"connect_args": {"timeout": 0.2}} if database_of(way) == "sqlite" else {}
    return {"poolclass": sa.pool.NullPool, **patience}


@contextmanager
def _sqlite3(way: str, step: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(str(url(way, step).database), timeout=0.2)) as connection, connection:
        yield connection


@contextmanager
def _apsw(way: str, step: str) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(url(way, step).database))) as connection, connection:
        connection.set_busy_timeout(200)
        yield connection


@contextmanager
def _django(way: str, step: str) -> Iterator[Any]:
    from django.conf import settings
    from django.db import connections, transaction

    if not settings.configured:
        settings.configure()
    at = url(way, step)
    connections.databases[way + step] = connections.configure_settings(
        {"default": {}, way + step: {
            "ENGINE": f"django.db.backends.{database_of(way).replace('sqlite', 'sqlite3')}",
            "NAME": at.database, "USER": at.username, "HOST": at.host, "PORT": at.port,
            "OPTIONS": {"timeout": 0.2} if database_of(way) == "sqlite" else {},
        }}
    )[way + step]  # fmt: skip
    try:
        with transaction.atomic(using=way + step):
            yield connections[way + step]
    finally:
        connections[way + step].close()


@asynccontextmanager
async def _psycopg_async(way: str, step: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(_plain(way, step)) as connection:
        yield connection


@asynccontextmanager
async def _asyncpg(way: str, step: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(_plain(way, step))
    try:
        async with connection.transaction():
            yield connection
    finally:
        await connection.close()


def _plain(way: str, step: str) -> str:
    return url(way, step).render_as_string(hide_password=False)


SYNC: dict[str, Callable[[str, str], AbstractContextManager[Any]]] = {
    "sqlite3": _sqlite3,
    "apsw": _apsw,
    "django-sqlite": _django,
    "django-postgresql": _django,
    "psycopg-postgresql": lambda way, step: psycopg.connect(_plain(way, step)),
    "connection-sqlite": lambda way, step: engine(way, step).begin(),
    "connection-postgresql": lambda way, step: engine(way, step).begin(),
    "connection-mysql": lambda way, step: engine(way, step).begin(),
    "session-sqlite": lambda way, step: sessionmaker(engine(way, step)).begin(),
    "session-postgresql": lambda way, step: sessionmaker(engine(way, step)).begin(),
    "session-mysql": lambda way, step: sessionmaker(engine(way, step)).begin(),
}
ASYNC: dict[str, Callable[[str, str], AbstractAsyncContextManager[Any]]] = {
    "psycopg-async-postgresql": _psycopg_async,
    "asyncpg-postgresql": _asyncpg,
    "async-connection-postgresql": lambda way, step: async_engine(way, step).begin(),
    "async-session-postgresql": lambda way, step: async_sessionmaker(async_engine(way, step)).begin(),
    "async-session-mysql": lambda way, step: async_sessionmaker(async_engine(way, step)).begin(),
    "async-session-sqlite": lambda way, step: async_sessionmaker(async_engine(way, step)).begin(),
}

app = App(os.environ.get("FROZEN_BROKER", "memory://"))
_options_of_task: dict[str, Any] = {"lease": LEASE, "retry": RetryPolicy(max_attempts=99, backoff=lambda _: 0.2)}


@app.task(**_options_of_task)
def pay(way: str, step: str, ctx: Context = INJECTED) -> int:
    with _ending(way, step, ctx), SYNC[way](way, step) as connection:
        for statement in _before(way, step):
            _run(connection, statement)
        while _stops(BEFORE, way, step, ctx):
            time.sleep(0.01)
        ctx.once(connection)
        _run(connection, _effect(way, step))
        while _stops(AFTER, way, step, ctx):
            time.sleep(0.01)
    return os.getpid()


@app.task(**_options_of_task)
async def apay(way: str, step: str, ctx: Context = INJECTED) -> int:
    # The worker cancels it when it finds the lease lost. One that goes on regardless is the worse case.
    return await asyncio.shield(_apay(way, step, ctx))


async def _apay(way: str, step: str, ctx: Context) -> int:
    with _ending(way, step, ctx):
        async with ASYNC[way](way, step) as connection:
            for statement in _before(way, step):
                await _run(connection, statement)
            while _stops(BEFORE, way, step, ctx):  # noqa: ASYNC110 -- told across processes
                await asyncio.sleep(0.01)
            await ctx.aonce(connection)
            await _run(connection, _effect(way, step))
            while _stops(AFTER, way, step, ctx):  # noqa: ASYNC110 -- told across processes
                await asyncio.sleep(0.01)
    return os.getpid()


@contextmanager
def _ending(way: str, step: str, ctx: Context) -> Iterator[None]:
    try:
        yield
    finally:
        if ctx.attempt == 1:
            (folder() / f"{way} {step}.ended").touch()


def _before(way: str, step: str) -> list[str]:
    # A look makes a snapshot which is older than the other's commit.
    give_up = _GIVE_UP.get(database_of(way)) if step == AFTER else None
    return [*([give_up] if give_up else []), f"SELECT amount FROM account WHERE name = '{way} {step}'"]


def _effect(way: str, step: str) -> str:
    return f"UPDATE account SET amount = amount - 10 WHERE name = '{way} {step}'"


def _stops(here: str, way: str, step: str, ctx: Context) -> bool:
    """Whether to stay here for now; the file tells that it is here."""
    if here != step or ctx.attempt > 1 or (folder() / "thawed").exists():
        return False
    (folder() / f"{way} {step}.there").touch()
    return True


def _run(connection: Any, statement: str) -> Any:
    if not hasattr(connection, "execute"):
        with connection.cursor() as cursor:
            return cursor.execute(statement)
    return connection.execute(sa.text(statement) if "sqlalchemy" in type(connection).__module__ else statement)
