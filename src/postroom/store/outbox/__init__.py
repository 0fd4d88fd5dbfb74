"""The outbox: messages written in the user's own transaction, to be sent to the broker by a relay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from postroom.errors import ConfigurationError
from postroom.message import Message
from postroom.store.inbox.connections import Database, Kind, database_of, kind_of

TABLE = "postroom_outbox"
LEADER = "postroom_outbox_leader"

_CREATE: dict[Database, tuple[str, str]] = {
    "sqlite": (
        f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            seq     INTEGER PRIMARY KEY AUTOINCREMENT,
            id      TEXT NOT NULL,
            message TEXT NOT NULL,
            error   TEXT
        )
        """,
        f"CREATE TABLE IF NOT EXISTS {LEADER} (one INTEGER PRIMARY KEY, holder TEXT NOT NULL, until REAL NOT NULL)",
    ),
    "postgresql": (
        f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            seq     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            id      text NOT NULL,
            message text NOT NULL,
            error   text
        )
        """,
        f"""
        CREATE TABLE IF NOT EXISTS {LEADER} (
            one integer PRIMARY KEY, holder text NOT NULL, until double precision NOT NULL
        )
        """,
    ),
    "mysql": (
        f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            seq     bigint AUTO_INCREMENT PRIMARY KEY,
            id      varchar(191) NOT NULL,
            message longtext CHARACTER SET utf8mb4 NOT NULL,
            error   text CHARACTER SET utf8mb4
        )
        """,
        f"""
        CREATE TABLE IF NOT EXISTS {LEADER} (
            one integer PRIMARY KEY, holder varchar(191) NOT NULL, until double NOT NULL
        )
        """,
    ),
}
# On PostgreSQL it wakes the relay at the commit, in the same round trip; many in one transaction are one notification.
_NOTIFY: dict[Database, str] = {
    "sqlite": "", "postgresql": f" RETURNING pg_notify('{TABLE}', '')", "mysql": ""
}  # fmt: skip
_ROWS = 100
"""Rows that one statement inserts."""
_STATS = f"SELECT count(*) - count(error), count(error) FROM {TABLE}"
_FIRST = f"SELECT message FROM {TABLE} WHERE error IS NULL ORDER BY seq LIMIT 1"
_MISSING = ("no such table", "does not exist", "doesn't exist")

_message = msgspec.json.Decoder(Message)


class OutboxStats(NamedTuple):
    """An outbox in numbers."""

    waiting: int
    set_aside: int
    """What no relay could send, and none will until ``postroom outbox retry``."""
    oldest: float | None
    """Unix time at which the oldest waiting message was made; ``None`` if none waits. Its age is how far relays lag."""


def create_outbox(connection: Any) -> None:
    """Create the tables that ``using(transaction=connection)`` writes to, where the broker is another system.

    ``connection``: of ``sqlite3``, apsw, psycopg, SQLAlchemy (also a session) or Django; the caller commits.
    Raises ``ConfigurationError`` for another.
    """
    kind = _kind(connection, awaited=False)
    for sql in _CREATE[database_of(kind, connection)]:
        kind.run(connection, sql, ())


async def acreate_outbox(connection: Any) -> None:
    """:func:`create_outbox` for asyncpg, and the asynchronous connections of psycopg and SQLAlchemy."""
    kind = _kind(connection, awaited=True)
    for sql in _CREATE[database_of(kind, connection)]:
        await kind.run(connection, sql, ())


def outbox_stats(connection: Any) -> OutboxStats:
    """How much waits to be sent, since when, and what could not be sent. ``connection``: as for :func:`create_outbox`.

    Raises ``ConfigurationError`` if there is no table.
    """
    kind = kind_of(connection)
    if kind.awaited:
        raise ConfigurationError("outbox_stats: this connection is asynchronous; see `postroom outbox status --json`")
    with _told("outbox_stats: "):
        ((waiting, set_aside),) = kind.fetch(connection, _STATS, ())
        first = kind.fetch(connection, _FIRST, ())
    return OutboxStats(int(waiting), int(set_aside), decode(first[0][0]).created_at if first else None)


def write(connection: Any, messages: Sequence[Message]) -> None:
    """Add messages in the connection's open transaction. Raises ``ConfigurationError``."""
    kind = _kind(connection, awaited=False)
    _check_transaction(kind, connection)
    with _told("transaction=: the connection is not to the broker's own database, and "):
        for sql, parameters in _inserts(database_of(kind, connection), messages):
            kind.run(connection, sql, parameters)


async def awrite(connection: Any, messages: Sequence[Message]) -> None:
    """:func:`write` for any connection, asynchronous or not."""
    if not kind_of(connection).awaited:
        return write(connection, messages)
    kind = _kind(connection, awaited=True)
    _check_transaction(kind, connection)
    with _told("transaction=: the connection is not to the broker's own database, and "):
        for sql, parameters in _inserts(database_of(kind, connection), messages):
            await kind.run(connection, sql, parameters)
    return None


def encode(message: Message) -> str:
    """As text, body and all."""
    return msgspec.json.encode(msgspec.structs.replace(message, headers=dict(message.headers))).decode()


def decode(text: str) -> Message:
    return _message.decode(text)


def _inserts(database: Database, messages: Sequence[Message]) -> Iterator[tuple[str, list[str]]]:
    for start in range(0, len(messages), _ROWS):
        rows = messages[start : start + _ROWS]
        sql = f"INSERT INTO {TABLE} (id, message) VALUES {', '.join(['(?, ?)'] * len(rows))}{_NOTIFY[database]}"
        yield sql, [text for message in rows for text in (message.id, encode(message))]


def _kind(connection: Any, *, awaited: bool) -> Kind:
    kind = kind_of(connection)
    if kind.awaited and not awaited:
        raise ConfigurationError("transaction=: this connection is asynchronous; use the method that begins with a")
    if awaited and not kind.awaited:
        raise ConfigurationError("acreate_outbox: this connection is not asynchronous; use create_outbox")
    return kind


def _check_transaction(kind: Kind, connection: Any) -> None:
    if not kind.joins(connection):
        raise ConfigurationError(
            "transaction=: no transaction is open, and this connection commits each statement by itself; begin one "
            "first, so that the message and your changes commit together"
        )


@contextmanager
def _told(before: str) -> Iterator[None]:
    """Say what to do about a missing table; any other failed statement is its library's affair."""
    try:
        yield
    except Exception as error:
        if TABLE in str(error) and any(phrase in str(error) for phrase in _MISSING):
            raise ConfigurationError(
                f"{before}there is no table {TABLE} for a relay; call postroom.create_outbox(connection) where you "
                "create your own tables, or run `postroom outbox create`"
            ) from error
        raise
