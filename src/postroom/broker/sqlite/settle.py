"""What outcomes do to rows. Every statement is fenced: it touches a row only under the lease it was claimed with."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from postroom.broker.base import Ack, Dead, Outcome, Release, Retry
from postroom.broker.sqlite import rows
from postroom.broker.sqlite.schema import CANCELLED, EXPIRED, LEASED
from postroom.message import Failure

FRONT = 0.0
"""The ``visible_at`` of what was given back: ahead of all that is ready."""

_ACK = """
UPDATE message SET state = 2, lane = lane - 100, visible_at = NULL, lease = 0, line = NULL, suspect = 0,
    body = NULL, progress = NULL,
    result = ?, finished_at = ?, purge_at = ? + result_ttl
WHERE seq = ? AND lease = ?
"""
_ACK_MANY = """
UPDATE message SET state = 2, lane = lane - 100, visible_at = NULL, lease = 0, line = NULL, suspect = 0,
    body = NULL, progress = NULL,
    finished_at = ?, purge_at = ? + result_ttl
WHERE lease = ? AND seq IN (SELECT value FROM json_each(?))
"""
_ACK_RESULTS = """
UPDATE message SET state = 2, lane = lane - 100, visible_at = NULL, lease = 0, line = NULL, suspect = 0,
    body = NULL, progress = NULL,
    result = CAST(json_extract(done.value, '$[2]') AS BLOB), finished_at = ?, purge_at = ? + result_ttl
FROM json_each(?) AS done
WHERE seq = json_extract(done.value, '$[0]') AND lease = json_extract(done.value, '$[1]')
"""
_json = msgspec.json.encode
_RETRY = """
UPDATE message SET state = 0, lane = lane - 100, visible_at = ?, due = ?, lease = 0, failures = failures + 1,
    suspect = ?, progress = NULL
WHERE seq = ? AND lease = ?
"""
_RELEASE = """
UPDATE message SET state = 0, lane = lane - 100, visible_at = ?, due = ?, lease = 0, progress = NULL
WHERE seq = ? AND lease = ?
"""
_DEAD = """
UPDATE message SET state = 3, lane = lane - 100, visible_at = NULL, lease = 0, line = NULL, suspect = 0,
    failures = failures + 1, finished_at = ? WHERE seq = ? AND lease = ?
"""
_END = """
UPDATE message SET state = ?, lane = CASE WHEN lane > 0 THEN lane - 100 ELSE lane END, visible_at = NULL, lease = 0,
    line = NULL, suspect = 0, body = NULL, finished_at = ?, purge_at = ? + result_ttl WHERE seq = ? AND lease = ?
"""
_CANCEL_WANTED = "SELECT cancel FROM message WHERE seq = ? AND lease = ?"
_EXTEND = "UPDATE message SET visible_at = ? WHERE seq = ? AND lease = ?"
_EXTEND_MANY = """
UPDATE message SET visible_at = ? FROM json_each(?) AS held
WHERE seq = json_extract(held.value, '$[0]') AND lease = json_extract(held.value, '$[1]')
"""
# Of a key with a long backlog only these are looked at.
_VISIBLE = """
SELECT seq, state FROM message INDEXED BY message_head WHERE sub = ? AND line = ? AND visible_at IS NOT NULL
"""
_HEAD = "SELECT min(seq) FROM message INDEXED BY message_line WHERE sub = ? AND line = ?"

Claim = tuple[int, int]
"""(seq, lease) of a delivery."""


def acknowledge(connection: sqlite3.Connection, now: float, items: Sequence[tuple[Claim, Ack]]) -> list[bool]:
    """Whether each was still held.

    One statement a batch where all are, which is the rule: each row stepped through on its own would wait for
    Python's interpreter lock, under the write lock, whenever a handler burns CPU.
    """
    plain: dict[int, list[int]] = {}
    for (seq, lease), ack in items:
        if ack.result is None:
            plain.setdefault(lease, []).append(seq)
    results = [(seq, lease, ack.result.decode()) for (seq, lease), ack in items if ack.result is not None]
    connection.execute("SAVEPOINT acknowledge")
    done = sum(
        connection.execute(_ACK_MANY, (now, now, lease, _json(seqs).decode())).rowcount for lease, seqs in plain.items()
    )
    if results:
        done += connection.execute(_ACK_RESULTS, (now, now, _json(results).decode())).rowcount
    if done != len(items):
        connection.execute("ROLLBACK TO acknowledge")
    connection.execute("RELEASE acknowledge")
    if done == len(items):
        return [True] * done
    return [changed(connection, _ACK, (ack.result, now, now, seq, lease)) for (seq, lease), ack in items]


def perform(connection: sqlite3.Connection, now: float, claim: Claim, outcome: Outcome) -> bool | None:
    """Any outcome. ``None``: no longer held; else whether the message is settled for good."""
    seq, lease = claim
    again = isinstance(outcome, Retry | Release)
    # It would run again although its cancellation was confirmed to somebody.
    cancelled = again and connection.execute(_CANCEL_WANTED, claim).fetchone() == (1,)
    if isinstance(outcome, Ack):
        done = changed(connection, _ACK, (outcome.result, now, now, seq, lease))
    elif isinstance(outcome, Retry):
        at = now + outcome.delay
        done = changed(connection, _RETRY, (at, at, int(outcome.suspect), seq, lease))
    elif isinstance(outcome, Release):
        at = now + outcome.delay if outcome.delay > 0 else FRONT
        done = changed(connection, _RELEASE, (at, max(at, now), seq, lease))
    elif isinstance(outcome, Dead):
        done = changed(connection, _DEAD, (now, seq, lease))
    else:
        done = changed(connection, _END, (CANCELLED, now, now, seq, lease))
    if not done:
        return None
    if isinstance(outcome, Retry | Dead):
        rows.add_failure(connection, seq, outcome.failure)
    if cancelled:
        changed(connection, _END, (CANCELLED, now, now, seq, 0))
    return cancelled or not again


def end(connection: sqlite3.Connection, now: float, state: int, seq: int, lease: int = 0) -> bool:
    """End a message that no handler runs, as cancelled or expired, and let the next of its key run."""
    row = connection.execute("SELECT sub, line FROM message WHERE seq = ? AND lease = ?", (seq, lease)).fetchone()
    if row is None or not changed(connection, _END, (state, now, now, seq, lease)):
        return False
    connection.execute("UPDATE subscription SET live = live - 1 WHERE id = ?", (row[0],))
    if row[1] is not None:
        advance(connection, *row)
    return True


def expire(connection: sqlite3.Connection, now: float, limit: int, sub: int | None = None) -> None:
    """End what waits past its expiry, of one subscription or of all."""
    found = connection.execute(
        "SELECT seq FROM message INDEXED BY message_expiry WHERE expires_at <= ? AND state = 0 "
        "AND sub = coalesce(?, sub) LIMIT ?",
        (now, sub, limit),
    ).fetchall()
    for (seq,) in found:
        end(connection, now, EXPIRED, seq)


def is_held(connection: sqlite3.Connection, claim: Claim) -> bool:
    """Whether the message is still under that lease."""
    return connection.execute("SELECT 1 FROM message WHERE seq = ? AND lease = ?", claim).fetchone() is not None


def extend(connection: sqlite3.Connection, until: float, held: Sequence[Claim]) -> list[bool]:
    """Whether each is still held; those that are, are so until then. One statement for all, as in ``acknowledge``."""
    done = connection.execute(_EXTEND_MANY, (until, _json(held).decode())).rowcount
    if done == len(held):
        return [True] * done
    return [changed(connection, _EXTEND, (until, seq, lease)) for seq, lease in held]


def give_back(connection: sqlite3.Connection, now: float, seq: int, lease: int, *, started: bool, worker: str) -> bool:
    """Return what a dead or frozen holder had: counted, and as a suspect, only if it had started it."""
    row = connection.execute(
        "SELECT failures, started_at, cancel, sub, line FROM message WHERE seq = ? AND lease = ?", (seq, lease)
    ).fetchone()
    if row is None:
        return False
    failures, started_at, cancel, sub, line = row
    if cancel and not started:
        return end(connection, now, CANCELLED, seq, lease)
    if not started:
        changed(connection, _RELEASE, (FRONT, now, seq, lease))
    else:
        failure = Failure(
            attempt=failures + 1,
            reason="worker_lost",
            message="its worker died, or froze past its lease, while it ran",
            worker=worker,
            started_at=started_at,
            failed_at=now,
        )
        connection.execute(_RETRY, (FRONT, now, 1, seq, lease))
        rows.add_failure(connection, seq, failure)
        if cancel:
            return end(connection, now, CANCELLED, seq)
    if line is not None:
        # An older one of its key may have been redriven meanwhile: it goes first.
        advance(connection, sub, line)
    return True


def advance(connection: sqlite3.Connection, sub: int, line: str) -> None:
    """Let the first message of a key be claimed, if none of that key is running; and only the first."""
    visible = connection.execute(_VISIBLE, (sub, line)).fetchall()
    if any(state == LEASED for _, state in visible):
        return
    (head,) = connection.execute(_HEAD, (sub, line)).fetchone()
    for seq, _ in visible:
        if seq != head:
            connection.execute("UPDATE message SET visible_at = NULL WHERE seq = ?", (seq,))
    connection.execute("UPDATE message SET visible_at = due WHERE seq = ? AND visible_at IS NULL", (head,))


def changed(connection: sqlite3.Connection, sql: str, bindings: tuple[Any, ...]) -> bool:
    return connection.execute(sql, bindings).rowcount > 0
