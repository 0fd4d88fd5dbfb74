"""A transaction in each kind of connection that ``ctx.once`` knows, on servers that environment variables name."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, closing, contextmanager
from typing import Any

import apsw
import asyncpg
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

_DRIVERS = {"sqlite": "", "postgresql": "+psycopg", "mysql": "+pymysql"}
_ASYNC_DRIVERS = {"sqlite": "+aiosqlite", "postgresql": "+asyncpg", "mysql": "+aiomysql"}

_setting_up = threading.Lock()


def database_of(way: str) -> str:
    """``sqlite``, ``postgresql`` or ``mysql``."""
    return {"sqlite3": "sqlite", "apsw": "sqlite"}.get(way) or way.rpartition("-")[2]


def url_of(way: str, name: str) -> sa.URL:
    # SQLite locks whole files, so each account has its own.
    lite = f"sqlite:///{os.environ['SHOP_FOLDER']}/{way} {name}.db"
    return sa.make_url(os.environ.get(f"SHOP_{database_of(way).upper()}", lite))


def engine_of(way: str, name: str) -> sa.Engine:
    return sa.create_engine(_driven(url_of(way, name), _DRIVERS), **_options(way))


def async_engine_of(way: str, name: str) -> AsyncEngine:
    return create_async_engine(_driven(url_of(way, name), _ASYNC_DRIVERS), **_options(way))


def _driven(plain: sa.URL, drivers: dict[str, str]) -> sa.URL:
    return plain.set(drivername=plain.drivername + drivers[plain.drivername])


def _options(way: str) -> dict[str, Any]:
    patience = {"connect_args": {"timeout": 0.2}} if database_of(way) == "sqlite" else {}
    return {"poolclass": sa.pool.NullPool, **patience}


@contextmanager
def _sqlite3(way: str, name: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(str(url_of(way, name).database), timeout=0.2)) as connection, connection:
        yield connection


@contextmanager
def _apsw(way: str, name: str) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(url_of(way, name).database))) as connection, connection:
        connection.set_busy_timeout(200)
        yield connection


@contextmanager
def _django(way: str, name: str) -> Iterator[Any]:
    import django
    from django.conf import settings
    from django.db import connections, transaction

    with _setting_up:
        if not settings.configured:
            settings.configure(LOGGING_CONFIG=None)
            django.setup()
    at = url_of(way, name)
    connections.databases[way + name] = connections.configure_settings(
        {"default": {}, way + name: {
            "ENGINE": f"django.db.backends.{database_of(way).replace('sqlite', 'sqlite3')}",
            "NAME": at.database, "USER": at.username, "HOST": at.host, "PORT": at.port,
            "OPTIONS": {"timeout": 0.2} if database_of(way) == "sqlite" else {},
        }}
    )[way + name]  # fmt: skip
    try:
        with transaction.atomic(using=way + name):
            yield connections[way + name]
    finally:
        connections[way + name].close()


@asynccontextmanager
async def _psycopg_async(way: str, name: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(_plain(way, name)) as connection:
        yield connection


@asynccontextmanager
async def _asyncpg(way: str, name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(_plain(way, name))
    try:
        async with connection.transaction():
            yield connection
    finally:
        await connection.close()


def _plain(way: str, name: str) -> str:
    return url_of(way, name).render_as_string(hide_password=False)


SYNC: dict[str, Callable[[str, str], AbstractContextManager[Any]]] = {
    "sqlite3": _sqlite3,
    "apsw": _apsw,
    "django-sqlite": _django,
    "django-postgresql": _django,
    "psycopg-postgresql": lambda way, name: psycopg.connect(_plain(way, name)),
    "connection-sqlite": lambda way, name: engine_of(way, name).begin(),
    "connection-postgresql": lambda way, name: engine_of(way, name).begin(),
    "connection-mysql": lambda way, name: engine_of(way, name).begin(),
    "session-sqlite": lambda way, name: sessionmaker(engine_of(way, name)).begin(),
    "session-postgresql": lambda way, name: sessionmaker(engine_of(way, name)).begin(),
    "session-mysql": lambda way, name: sessionmaker(engine_of(way, name)).begin(),
}
ASYNC: dict[str, Callable[[str, str], AbstractAsyncContextManager[Any]]] = {
    "psycopg-async-postgresql": _psycopg_async,
    "asyncpg-postgresql": _asyncpg,
    "async-connection-postgresql": lambda way, name: async_engine_of(way, name).begin(),
    "async-session-postgresql": lambda way, name: async_sessionmaker(async_engine_of(way, name)).begin(),
    "async-session-mysql": lambda way, name: async_sessionmaker(async_engine_of(way, name)).begin(),
    "async-session-sqlite": lambda way, name: async_sessionmaker(async_engine_of(way, name)).begin(),
}


def run(connection: Any, statement: str) -> Any:
    if not hasattr(connection, "execute"):
        with connection.cursor() as cursor:
            return cursor.execute(statement)
    return connection.execute(sa.text(statement) if "sqlalchemy" in type(connection).__module__ else statement)
