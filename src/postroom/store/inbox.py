"""The inbox: marks of processed messages, kept in the user's own database and transactions."""

from __future__ import annotations

import sqlite3
import time

from postroom.errors import ConfigurationError
from postroom.signals import AlreadyProcessed

TABLE = "postroom_inbox"

_CREATE = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
    subscription TEXT NOT NULL,
    message_id   TEXT NOT NULL,
    done_at      REAL NOT NULL,
    PRIMARY KEY (subscription, message_id)
) WITHOUT ROWID
"""


def create_inbox(connection: sqlite3.Connection) -> None:
    """Create the table that ``ctx.once`` writes to, if it is missing. Call it where you create your own tables.

    The caller commits. Raises ``ConfigurationError`` for a connection that is not ``sqlite3``'s.
    """
    _check(connection)
    connection.execute(_CREATE)


def mark(connection: sqlite3.Connection, subscription: str, message_id: str) -> None:
    """Record (subscription, message) as done in the connection's transaction; see ``Context.once``."""
    _check(connection)
    _check_transaction(connection)
    try:
        connection.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?)", (subscription, message_id, time.time()))
    except sqlite3.IntegrityError as error:
        raise AlreadyProcessed(f"{subscription} has processed message {message_id} before") from error
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        raise ConfigurationError(
            f"ctx.once: the database has no table {TABLE}; call postroom.create_inbox(connection) where you create "
            "your own tables"
        ) from error


def _check(connection: object) -> None:
    if not isinstance(connection, sqlite3.Connection):
        raise ConfigurationError(
            f"ctx.once and create_inbox take a sqlite3.Connection, not {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )


def _check_transaction(connection: sqlite3.Connection) -> None:
    """A connection in autocommit mode would commit the mark before the effect: a crash between loses the effect."""
    autocommit = getattr(connection, "autocommit", -1) is True or connection.isolation_level is None
    if autocommit and not connection.in_transaction:
        raise ConfigurationError(
            "ctx.once: this connection commits each statement by itself; open a transaction first "
            '(connection.execute("BEGIN IMMEDIATE")), so that the mark and your changes commit together'
        )
