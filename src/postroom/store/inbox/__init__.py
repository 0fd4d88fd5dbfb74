"""The inbox: marks of processed messages, kept in the user's own database and transactions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

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
            result       TEXT,
            PRIMARY KEY (subscription, message_id)
        ) WITHOUT ROWID
    """,
    "postgresql": f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            subscription text NOT NULL,
            message_id   text NOT NULL,
            done_at      double precision NOT NULL,
            result       text,
            PRIMARY KEY (subscription, message_id)
        )
    """,
    "mysql": f"""
        CREATE TABLE IF NOT EXISTS {TABLE} (
            subscription varchar(127) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
            message_id   varchar(191) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
            done_at      double NOT NULL,
            result       longtext CHARACTER SET utf8mb4,
            PRIMARY KEY (subscription, message_id)
        )
    """,
}
_COLUMNS: dict[Database, str] = {
    "sqlite": f"SELECT name FROM pragma_table_info('{TABLE}')",
    "postgresql": f"SELECT column_name::text FROM information_schema.columns WHERE table_name = '{TABLE}' "
    "AND table_schema = ANY(current_schemas(false)::text[])",
    "mysql": f"SELECT column_name FROM information_schema.columns WHERE table_name = '{TABLE}' "
    "AND table_schema = database()",
}
_ADD_RESULT: dict[Database, str] = {
    "sqlite": f"ALTER TABLE {TABLE} ADD COLUMN result TEXT",
    "postgresql": f"ALTER TABLE {TABLE} ADD COLUMN result text",
    "mysql": f"ALTER TABLE {TABLE} ADD COLUMN result longtext CHARACTER SET utf8mb4",
}
_INSERT = f"INSERT INTO {TABLE} (subscription, message_id, done_at) VALUES (?, ?, ?)"
# A failed statement would end a PostgreSQL transaction, so a duplicate is no failure there; it waits until an
# uncommitted one is decided. In MySQL only this statement fails, and counts of rows depend on the client's flags.
_MARK: dict[Database, str] = {
    "sqlite": f"{_INSERT} ON CONFLICT DO NOTHING",
    "postgresql": f"{_INSERT} ON CONFLICT DO NOTHING",
    "mysql": _INSERT,
}
_KEEP = f"UPDATE {TABLE} SET result = ? WHERE subscription = ? AND message_id = ?"
_KEPT = f"SELECT result FROM {TABLE} WHERE subscription = ? AND message_id = ?"
_RESULT: dict[Database, str] = {
    "sqlite": _KEPT,
    "postgresql": _KEPT,
    # The transaction's snapshot may be older than the mark; a locking read sees what is committed.
    "mysql": f"{_KEPT} LOCK IN SHARE MODE",
}
_PURGE = f"DELETE FROM {TABLE} WHERE done_at < ?"
# MySQL locks whatever such a statement looks at, so that every handler would wait for the end of the purge. A plain
# read locks nothing, nor does it wait; a deletion by the whole key locks that one mark.
_OLD = (
    f"SELECT subscription, message_id FROM {TABLE} WHERE done_at < ? AND (subscription, message_id) > (?, ?) "
    "ORDER BY subscription, message_id LIMIT 10000"
)
_PURGE_ONE = f"DELETE FROM {TABLE} WHERE subscription = ? AND message_id = ?"
_STATS = f"SELECT count(*), min(done_at) FROM {TABLE}"
_MISSING = ("no such table", "does not exist", "doesn't exist", "no such column", "has no column", "Unknown column")
_DUPLICATE = "1062"
"""ER_DUP_ENTRY (MySQL and MariaDB error reference)."""


class InboxStats(NamedTuple):
    """An inbox in numbers."""

    marks: int
    oldest: float | None
    """Unix time of the oldest mark; ``None`` if there is none."""


def create_inbox(connection: Any) -> None:
    """Create the table that ``ctx.once`` writes to, or bring an older one up to date. Repeating it changes nothing.

    Call it where you create or migrate your own tables, or use ``postroom inbox create``. ``connection``: of
    ``sqlite3``, apsw, psycopg, SQLAlchemy (also a session) or Django; the caller commits.
    Raises ``ConfigurationError`` for another.
    """
    kind = _plain(connection, "create_inbox", "acreate_inbox")
    database = database_of(kind, connection)
    kind.run(connection, _CREATE[database], ())
    if not _has_result(kind.fetch(connection, _COLUMNS[database], ())):
        kind.run(connection, _ADD_RESULT[database], ())


async def acreate_inbox(connection: Any) -> None:
    """:func:`create_inbox` for asyncpg, and the asynchronous connections of psycopg and SQLAlchemy."""
    kind = _awaited(connection, "acreate_inbox", "create_inbox")
    database = database_of(kind, connection)
    await kind.run(connection, _CREATE[database], ())
    if not _has_result(await kind.fetch(connection, _COLUMNS[database], ())):
        await kind.run(connection, _ADD_RESULT[database], ())


def purge_inbox(connection: Any, older_than: float) -> int:
    """Delete marks that are older than so many seconds. The caller commits. Returns how many.

    A message that is delivered again after its mark is gone is handled again: keep marks longer than a message can
    wait, be retried and lie among the dead letters.
    """
    kind = _plain(connection, "purge_inbox", "apurge_inbox")
    before = time.time() - older_than
    if database_of(kind, connection) != "mysql":
        return int(kind.run(connection, _PURGE, (before,)))
    count, last = 0, ("", "")
    while old := kind.fetch(connection, _OLD, (before, *last)):
        count += sum(int(kind.run(connection, _PURGE_ONE, tuple(row))) for row in old)
        last = tuple(old[-1])
    return count


async def apurge_inbox(connection: Any, older_than: float) -> int:
    """See :func:`purge_inbox`."""
    kind = _awaited(connection, "apurge_inbox", "purge_inbox")
    before = time.time() - older_than
    if database_of(kind, connection) != "mysql":
        return int(await kind.run(connection, _PURGE, (before,)))
    count, last = 0, ("", "")
    while old := await kind.fetch(connection, _OLD, (before, *last)):
        for row in old:
            count += int(await kind.run(connection, _PURGE_ONE, tuple(row)))
        last = tuple(old[-1])
    return count


def inbox_stats(connection: Any) -> InboxStats:
    """How many marks there are, and how old they are. Raises ``ConfigurationError`` if there is no table."""
    kind = kind_of(connection)
    if kind.awaited:
        raise ConfigurationError("inbox_stats: this connection is asynchronous; see `postroom inbox status --json`")
    with _told():
        ((marks, oldest),) = kind.fetch(connection, _STATS, ())
    return InboxStats(int(marks), oldest)


def mark(connection: Any, subscription: str, message_id: str) -> None:
    """Record (subscription, message) as done in the connection's transaction; see ``Context.once``."""
    kind = _plain(connection, "ctx.once", "ctx.aonce")
    _check_transaction(kind, connection)
    database = database_of(kind, connection)
    with _told():
        try:
            count = kind.run(connection, _MARK[database], (subscription, message_id, time.time()))
        except Exception as error:
            if not _is_duplicate(error):
                raise
            count = 0
        if count:
            return
        rows = kind.fetch(connection, _RESULT[database], (subscription, message_id))
    raise _processed(subscription, message_id, rows)


async def amark(connection: Any, subscription: str, message_id: str) -> None:
    """:func:`mark` for asynchronous connections."""
    kind = _awaited(connection, "ctx.aonce", "ctx.once")
    _check_transaction(kind, connection)
    database = database_of(kind, connection)
    with _told():
        try:
            count = await kind.run(connection, _MARK[database], (subscription, message_id, time.time()))
        except Exception as error:
            if not _is_duplicate(error):
                raise
            count = 0
        if count:
            return
        rows = await kind.fetch(connection, _RESULT[database], (subscription, message_id))
    raise _processed(subscription, message_id, rows)


def keep(connection: Any, subscription: str, message_id: str, result: bytes) -> None:
    """Write the result (JSON) beside the mark; see ``Context.keep_result``."""
    kind = _plain(connection, "ctx.keep_result", "ctx.akeep_result")
    with _told():
        count = kind.run(connection, _KEEP, (result.decode(), subscription, message_id))
    _check_kept(count)


async def akeep(connection: Any, subscription: str, message_id: str, result: bytes) -> None:
    """:func:`keep` for asynchronous connections."""
    kind = _awaited(connection, "ctx.akeep_result", "ctx.keep_result")
    with _told():
        count = await kind.run(connection, _KEEP, (result.decode(), subscription, message_id))
    _check_kept(count)


def _check_kept(count: int) -> None:
    if count == 0:
        raise ConfigurationError("ctx.keep_result: there is no mark; call ctx.once before, in the same transaction")


def _has_result(columns: Sequence[Any]) -> bool:
    return any(row[0] == "result" for row in columns)


def _processed(subscription: str, message_id: str, rows: Sequence[Any]) -> AlreadyProcessed:
    kept = rows[0][0] if rows else None
    result = None if kept is None else msgspec.json.decode(kept)
    return AlreadyProcessed(f"{subscription} has processed message {message_id} before", result=result)


def _is_duplicate(error: Exception) -> bool:
    return "IntegrityError" in type(error).__name__ and _DUPLICATE in str(error)


@contextmanager
def _told() -> Iterator[None]:
    """Say what to do about a missing table; any other failed statement is its library's affair."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if (TABLE in text or "result" in text) and any(phrase in text for phrase in _MISSING):
            raise ConfigurationError(
                f"ctx.once: the database has no table {TABLE} of this version; call postroom.create_inbox(connection) "
                "where you create your own tables, or run `postroom inbox create`"
            ) from error
        raise


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
