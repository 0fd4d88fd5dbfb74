"""Publishing inside a transaction of the user's own connection to the same file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from postroom.broker.sqlite.filetime import FileClock
from postroom.broker.sqlite.publish import Publication
from postroom.broker.sqlite.routing import Routes
from postroom.errors import ConfigurationError, PostroomError
from postroom.message import Message


def joins(connection: Any, path: Path) -> bool:
    """Whether ``connection`` is the standard library's, and to that file."""
    return isinstance(connection, sqlite3.Connection) and any(
        os.path.realpath(file) == os.path.realpath(path) for file in _files(connection)
    )


def publish_in(connection: Any, path: Path, clock: FileClock, messages: Sequence[Message]) -> list[str | PostroomError]:
    """Raises ``ConfigurationError`` unless ``connection`` is to that file and in a transaction."""
    if not isinstance(connection, sqlite3.Connection):
        # Another copy of SQLite in this process would not see our locks, nor we its: both would write at once.
        raise ConfigurationError(
            f"transaction=: give a sqlite3.Connection of the standard library, not {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )
    if not joins(connection, path):
        files = ", ".join(_files(connection)) or "memory"
        raise ConfigurationError(f"transaction=: the connection is to {files}, but the broker is on {path}")
    if not connection.in_transaction:
        raise ConfigurationError(
            'transaction=: no transaction is open; begin one first (connection.execute("BEGIN IMMEDIATE"))'
        )
    return Publication(_Plain(connection), Routes(), clock).store(messages)  # type: ignore[arg-type]


def _files(connection: sqlite3.Connection) -> list[str]:
    return [file for _, _, file in _Plain(connection).execute("PRAGMA database_list").fetchall() if file]


class _Plain:
    """The user's connection, whatever row factory it has."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def total_changes(self) -> int:
        return self._connection.total_changes

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._cursor().execute(sql, bindings)

    def executemany(self, sql: str, bindings: Iterable[Sequence[Any]]) -> sqlite3.Cursor:
        return self._cursor().executemany(sql, bindings)

    def _cursor(self) -> sqlite3.Cursor:
        cursor = self._connection.cursor()
        cursor.row_factory = None
        return cursor
