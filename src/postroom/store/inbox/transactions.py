"""What ``transaction=`` of a task may be, and how a transaction is opened with it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from postroom.errors import ConfigurationError
from postroom.store.inbox.connections import kind_of, kind_of_type, names_of

Begin = Callable[[Any], Any]
"""From what was given to a context manager, or what :func:`opened` and :func:`aopened` make one of."""


@contextmanager
def opened(source: Any) -> Iterator[Any]:
    """A connection in a transaction that commits at the end, and rolls back if anything was raised."""
    made = _beginning(type(source))(source)
    kind = kind_of_type(type(made))
    if kind is None and hasattr(made, "__enter__"):
        with made as connection:
            yield connection
        return
    if kind is None or kind.awaited:
        raise _mismatch(made, "a sync handler")
    try:
        with kind.begin(made):
            yield made
    finally:
        made.close()


@asynccontextmanager
async def aopened(source: Any) -> AsyncIterator[Any]:
    """:func:`opened` for asynchronous connections."""
    made = _beginning(type(source))(source)
    if inspect.iscoroutine(made):
        made = await made
    kind = kind_of_type(type(made))
    if kind is None and hasattr(made, "__aenter__"):
        async with made as connection:
            yield connection
        return
    if kind is None or not kind.awaited:
        # A sync connection that waits for another's mark would stop the loop which the other runs on.
        raise _mismatch(made, "an async handler")
    try:
        async with kind.begin(made):
            yield made
    finally:
        await made.close()


def check(source: Any, label: str) -> None:
    """Raise ``ConfigurationError`` unless ``source``, or an instance of it if it is a class, can open transactions."""
    own = source if isinstance(source, type) else type(source)
    if _known(own) is None and (isinstance(source, type) or not callable(source)):
        raise ConfigurationError(
            f"{label}: transaction={source!r}: give an engine or sessionmaker of SQLAlchemy, a pool, Django's "
            "connection, the class of a resource that is one of these, or a function that opens a connection or begins "
            "a transaction"
        )


def is_awaited(source: Any) -> bool | None:
    """Whether its connections are asynchronous; ``None`` if that is known only once one is opened."""
    own = source if isinstance(source, type) else type(source)
    return None if _known(own) is None else any(name in _ASYNCHRONOUS for name in names_of(own))


def _known(own: type) -> Begin | None:
    return next((_BEGIN[name] for name in names_of(own) if name in _BEGIN), None)


def _beginning(own: type) -> Begin:
    return _known(own) or (lambda source: source())


def _mismatch(made: Any, handler: str) -> ConfigurationError:
    own = type(made)
    return ConfigurationError(
        f"transaction=: it gave a {own.__module__}.{own.__qualname__}, which is not for {handler}"
    )


def _begin(source: Any) -> Any:
    return source.begin()


def _connection(source: Any) -> Any:
    return source.connection()


@asynccontextmanager
async def _asyncpg(pool: Any) -> AsyncIterator[Any]:
    async with pool.acquire() as connection, connection.transaction():
        yield connection


@contextmanager
def _django(connection: Any) -> Iterator[Any]:
    from django.db import close_old_connections, connections

    # Each thread has a connection of its own under this name; one that has died since must not fail every message.
    close_old_connections()
    own = connections[connection.alias]
    with kind_of(own).begin(own):
        yield own


_BEGIN: dict[str, Begin] = {
    "sqlalchemy.Engine": _begin,
    "sqlalchemy.AsyncEngine": _begin,
    "sqlalchemy.sessionmaker": _begin,
    "sqlalchemy.async_sessionmaker": _begin,
    "asyncpg.Pool": _asyncpg,
    "psycopg_pool.ConnectionPool": _connection,
    "psycopg_pool.AsyncConnectionPool": _connection,
    "django.BaseDatabaseWrapper": _django,
    "django.ConnectionProxy": _django,
}
"""By the first word of the module and the name of the class."""
_ASYNCHRONOUS = {
    "sqlalchemy.AsyncEngine",
    "sqlalchemy.async_sessionmaker",
    "asyncpg.Pool",
    "psycopg_pool.AsyncConnectionPool",
}
