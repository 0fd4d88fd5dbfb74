"""The photo service's own data: a SQLite file of its own, which Postroom knows nothing about."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postroom import create_inbox

TABLES = """
CREATE TABLE IF NOT EXISTS gallery (thumbnail TEXT PRIMARY KEY, photo TEXT, width INTEGER, height INTEGER);
CREATE TABLE IF NOT EXISTS search (thumbnail TEXT, word TEXT, PRIMARY KEY (thumbnail, word));
CREATE TABLE IF NOT EXISTS letters (id INTEGER PRIMARY KEY, text TEXT);
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, amount INTEGER);
INSERT OR IGNORE INTO accounts VALUES ('alice', 100);
"""


class Database:
    """One connection for all handlers of a process; a lock keeps the transactions of their threads apart."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        with self.transaction() as connection:
            for statement in TABLES.strip().split("\n"):
                connection.execute(statement)
            create_inbox(connection)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Committed on leaving; rolled back if an exception passes."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                yield self._connection

    def close(self) -> None:
        self._connection.close()
