"""Rows that change as their messages are delivered and settled; each in the open transaction."""

from __future__ import annotations

import sqlite3

from postroom.store.base import Again, Claim, End
from postroom.store.records import COLUMNS, Record

_FIND = f"SELECT seq, {', '.join(COLUMNS)} FROM record WHERE id = ? AND sub = ?"
_SAVE = f"UPDATE record SET {', '.join(f'{name} = ?' for name in COLUMNS)} WHERE seq = ?"
_FOREIGN = """
INSERT INTO record (id, sub, topic, name, state, due, created_at, expires_at, result_ttl, confirmed)
VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, 1)
"""


def deliver(connection: sqlite3.Connection, now: float, claim: Claim) -> End | None:
    """See ``Store.deliver``."""
    message = claim.message
    found = find(connection, message.id, claim.subscription)
    if found is None:
        bindings = (message.created_at, message.expires_at, message.result_ttl)
        due = message.not_before or message.created_at
        connection.execute(_FOREIGN, (message.id, claim.subscription, message.topic, message.name, due, *bindings))
        found = find(connection, message.id, claim.subscription)
        assert found is not None
    seq, record = found
    if not record.confirmed and message.idempotency_key is not None:
        # Its publisher may have died before it could: the key must not let another through.
        connection.execute("UPDATE dedup SET confirmed = 1 WHERE id = ?", (message.id,))
    end = record.deliver(claim, now)
    save(connection, seq, record)
    return end


def finish(connection: sqlite3.Connection, now: float, claim: Claim, end: End) -> bool:
    """See ``Store.finish``."""
    found = find(connection, claim.message.id, claim.subscription)
    if found is None:
        return False
    seq, record = found
    ours = record.finish(claim, end, now)
    if ours:
        save(connection, seq, record)
    return ours


def again(connection: sqlite3.Connection, now: float, claim: Claim, how: Again) -> None:
    """See ``Store.again``."""
    found = find(connection, claim.message.id, claim.subscription)
    if found is not None:
        seq, record = found
        record.again(claim, how, now)
        save(connection, seq, record)


def find(connection: sqlite3.Connection, job_id: str, sub: str) -> tuple[int, Record] | None:
    """A row's number and its record."""
    row = connection.execute(_FIND, (job_id, sub)).fetchone()
    if row is None:
        return None
    seq, state, attempt, confirmed, buried, cancel, *rest = row
    return seq, Record(state, attempt, bool(confirmed), bool(buried), bool(cancel), *rest)


def save(connection: sqlite3.Connection, seq: int, record: Record) -> None:
    connection.execute(_SAVE, (*record.values(), seq))
