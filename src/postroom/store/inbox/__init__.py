"""The inbox: marks of processed messages, kept in the user's own database and transactions."""

from __future__ import annotations

import time
from typing import Any

from postroom.errors import ConfigurationError
from postroom.signals import AlreadyProcessed
from postroom.store.inbox.connections import Database, Kind, database_of, kind_of

TABLE = "postroom_inbox"

# Names in MySQL's keys are short: 191 characters of utf8mb4 fit into every version's index.
_CREATE: dict[Database, str] = {
    "sqlite": f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            subscription TEXT NOT NULL,
            message_id   TEXT NOT NULL,
            done_at      REAL NOT NULL,
            PRIMARY KEY (subscription, message_id)
        ) WITHOUT ROWID
    """,
    "postgresql": f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            subscription text NOT NULL,
            message_id   text NOT NULL,
            done_at      double precision NOT NULL,
            PRIMARY KEY (subscription, message_id)
        )
    """,
    "mysql": f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            subscription varchar(127) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
            message_id   varchar(191) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
            done_at      double NOT NULL,
            PRIMARY KEY (subscription, message_id)
        )
    """,
}
_INSERT = f"INSERT INTO {TABLE} (subscription, message_id, done_at) VALUES (?, ?, ?)"
# A failed statement would end a PostgreSQL transaction, so a duplicate is no failure there; it waits until an
# uncommitted one is decided. In MySQL only this statement fails, and counts of rows depend on the client's flags.
_MARK: dict[Database, str] = {
    "sqlite": f"{_INSERT} ON CONFLICT DO NOTHING",
    "postgresql": f"{_INSERT} ON CONFLICT DO NOTHING",
    "mysql": _INSERT,
}
_PURGE = f"DELETE FROM {TABLE} WHERE done_at < ?"
_MISSING = ("no such table", "does not exist", "doesn't exist")
_DUPLICATE = "1062"
"""ER_DUP_ENTRY (MySQL and MariaDB error reference)."""


def create_inbox(connection: Any) -> None:
    """Create the table that ``ctx.once`` writes to, if it is missing. Call it where you create your own tables.

    ``connection``: of ``sqlite3``, apsw, psycopg, SQLAlchemy (also a session) or Django; the caller commits.
    Raises ``ConfigurationError`` for another.
    """
    kind = _plain(connection, "create_inbox", "acreate_inbox")
    kind.run(connection, _CREATE[database_of(kind, connection)], ())


async def acreate_inbox(connection: Any) -> None:
    """:func:`create_inbox` for asyncpg, and the asynchronous connections of psycopg and SQLAlchemy."""
    kind = _awaited(connection, "acreate_inbox", "create_inbox")
    await kind.run(connection, _CREATE[database_of(kind, connection)], ())


def purge_inbox(connection: Any, older_than: float) -> int:
    """Delete marks that are older than so many seconds. The caller commits. Returns how many.

    A message that is delivered again after its mark is gone is handled again: keep marks longer than a message can
    wait, be retried and lie among the dead letters.
    """
    kind = _plain(connection, "purge_inbox", "apurge_inbox")
    return int(kind.run(connection, _PURGE, (time.time() - older_than,)))


async def apurge_inbox(connection: Any, older_than: float) -> int:
    """See :func:`purge_inbox`."""
    kind = _awaited(connection, "apurge_inbox", "purge_inbox")
    return int(await kind.run(connection, _PURGE, (time.time() - older_than,)))


def mark(connection: Any, subscription: str, message_id: str) -> None:
    """Record (subscription, message) as done in the connection's transaction; see ``Context.once``."""
    kind = _plain(connection, "ctx.once", "ctx.aonce")
    _check_transaction(kind, connection)
    try:
        count = kind.run(connection, _MARK[database_of(kind, connection)], (subscription, message_id, time.time()))
    except Exception as error:
        raise _told(error, subscription, message_id) from error
    if count == 0:
        raise _processed(subscription, message_id)


async def amark(connection: Any, subscription: str, message_id: str) -> None:
    """:func:`mark` for asynchronous connections."""
    kind = _awaited(connection, "ctx.aonce", "ctx.once")
    _check_transaction(kind, connection)
    sql = _MARK[database_of(kind, connection)]
    try:
        count = await kind.run(connection, sql, (subscription, message_id, time.time()))
    except Exception as error:
        raise _told(error, subscription, message_id) from error
    if count == 0:
        raise _processed(subscription, message_id)


def _processed(subscription: str, message_id: str) -> AlreadyProcessed:
    return AlreadyProcessed(f"{subscription} has processed message {message_id} before")


def _told(error: Exception, subscription: str, message_id: str) -> Exception:
    """What the failed insert means; the error itself if nothing special."""
    text = str(error)
    if "IntegrityError" in type(error).__name__ and _DUPLICATE in text:
        return _processed(subscription, message_id)
    if TABLE in text and any(phrase in text for phrase in _MISSING):
        return ConfigurationError(
            f"ctx.once: the database has no table {TABLE}; call postroom.create_inbox(connection) where you create "
            "your own tables"
        )
    return error


def _check_transaction(kind: Kind, connection: Any) -> None:
    """A connection in autocommit mode would commit the mark before the effect: a crash between loses the effect."""
    if not kind.joins(connection):
        raise ConfigurationError(
            "ctx.once: this connection commits each statement by itself; open a transaction first, "
            "so that the mark and your changes commit together"
        )


def _plain(connection: Any, name: str, other: str) -> Kind:
    kind = kind_of(connection)
    if kind.awaited:
        raise ConfigurationError(f"{name}: this connection is asynchronous; write await {other}(…)")
    return kind


def _awaited(connection: Any, name: str, other: str) -> Kind:
    kind = kind_of(connection)
    if not kind.awaited:
        raise ConfigurationError(f"{name}: this connection is not asynchronous; write {other}(…)")
    return kind
