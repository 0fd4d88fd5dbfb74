"""What is done is removed after its time, in small steps, so that the file stays small and nobody waits long."""

from __future__ import annotations

import sqlite3

import msgspec

from postroom.broker.sqlite import settle

STEP = 500
"""Rows of each kind that one step removes."""

_DUE = """
SELECT EXISTS (SELECT 1 FROM message INDEXED BY message_purge WHERE purge_at <= ?1)
    OR EXISTS (SELECT 1 FROM message INDEXED BY message_expiry WHERE expires_at <= ?1 AND state = 0)
    OR EXISTS (SELECT 1 FROM log WHERE purge_at <= ?1) OR EXISTS (SELECT 1 FROM dedup WHERE until <= ?1)
"""


def is_due(connection: sqlite3.Connection, now: float) -> bool:
    """Whether there is anything to do. Only reads."""
    return bool(connection.execute(_DUE, (now,)).fetchone()[0])


def step(connection: sqlite3.Connection, now: float) -> None:
    """Expire what was never started, and remove what has ended long enough ago."""
    settle.expire(connection, now, STEP)
    old = connection.execute(
        "SELECT seq FROM message INDEXED BY message_purge WHERE purge_at <= ? LIMIT ?", (now, STEP)
    ).fetchall()
    if old:
        seqs = msgspec.json.encode([seq for (seq,) in old]).decode()
        connection.execute("DELETE FROM failure WHERE seq IN (SELECT value FROM json_each(?))", (seqs,))
        # Keys held by unique messages have no window: they go with what held them.
        connection.execute(
            "DELETE FROM dedup WHERE until = 9e999 AND (topic, key, id) IN (SELECT topic, idempotency_key, id "
            "FROM message WHERE seq IN (SELECT value FROM json_each(?)) AND idempotency_key IS NOT NULL)",
            (seqs,),
        )
        connection.execute("DELETE FROM message WHERE seq IN (SELECT value FROM json_each(?))", (seqs,))
    connection.execute("DELETE FROM log WHERE seq IN (SELECT seq FROM log WHERE purge_at <= ? LIMIT ?)", (now, STEP))
    connection.execute(
        "DELETE FROM dedup WHERE (topic, key) IN (SELECT topic, key FROM dedup WHERE until <= ? LIMIT ?)", (now, STEP)
    )


def give_back_space(connection: sqlite3.Connection) -> None:
    """Return some free pages to the file system; outside of a transaction."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    if free > STEP:
        connection.execute(f"PRAGMA incremental_vacuum({STEP})").fetchall()
