"""Accounts and a ledger in a SQLite database: the effects that must happen exactly once."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from postroom.store.inbox import create_inbox
from postroom.store.outbox import TABLE, create_outbox

ACCOUNTS = ("alice", "bob", "carol")
OPENING = 1_000
_LOOK_AGAIN = 0.02


class Bank:
    """Its file may be the broker's own. Each process opens its own connections."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        connection = self._connect()
        create_inbox(connection)
        create_outbox(connection)
        connection.execute("CREATE TABLE account (name TEXT PRIMARY KEY, balance INTEGER NOT NULL)")
        connection.execute(
            "CREATE TABLE ledger (seq INTEGER PRIMARY KEY, label TEXT NOT NULL, amount INTEGER NOT NULL)"
        )
        connection.execute("CREATE TABLE intent (label TEXT PRIMARY KEY)")
        for name in ACCOUNTS:
            connection.execute("INSERT INTO account VALUES (?, ?)", (name, OPENING))
        connection.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[sqlite3.Connection]:
        """An open write transaction; rolled back unless it was committed inside."""
        connection = self._connect()
        try:
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                        raise
                await asyncio.sleep(_LOOK_AGAIN)
            yield connection
        finally:
            connection.close()

    def move(self, connection: sqlite3.Connection, label: str, amount: int) -> None:
        """From the first account to another, with an entry in the ledger."""
        target = ACCOUNTS[1 + amount % (len(ACCOUNTS) - 1)]
        connection.execute("UPDATE account SET balance = balance - ? WHERE name = ?", (amount, ACCOUNTS[0]))
        connection.execute("UPDATE account SET balance = balance + ? WHERE name = ?", (amount, target))
        connection.execute("INSERT INTO ledger (label, amount) VALUES (?, ?)", (label, amount))

    def read(self) -> tuple[dict[str, int], list[tuple[str, int]], set[str]]:
        """Balances, the ledger in its order, and the labels of committed intents."""
        connection = self._connect()
        balances = dict(connection.execute("SELECT name, balance FROM account").fetchall())
        ledger = connection.execute("SELECT label, amount FROM ledger ORDER BY seq").fetchall()
        kept = {label for (label,) in connection.execute("SELECT label FROM intent")}
        connection.close()
        return balances, ledger, kept

    def waiting(self) -> int:
        """Messages in the outbox."""
        connection = self._connect()
        (count,) = connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()
        connection.close()
        return int(count)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = wal")
        return connection
