"""What becomes of a record as its message is delivered and settled; each in the open transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

import msgspec

from postroom.message import Failure
from postroom.store.base import Again, Buried, Cancelled, Claim, Done, End
from postroom.store.sqlite.schema import CANCELLED, DEAD, RUNNING, SUCCEEDED, WAITING

_FIND = "SELECT seq, state, attempt, buried, cancel, copy, failures, confirmed FROM record WHERE id = ? AND sub = ?"
_FOREIGN = """
INSERT INTO record (id, sub, topic, name, state, due, created_at, expires_at, result_ttl, confirmed)
VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, 1)
"""
_RUN = f"""
UPDATE record SET state = {RUNNING}, attempt = ?, token = ?, copy = ?, failures = ?, started_at = ?, buried = 0,
    cancel = 0, confirmed = 1, progress = NULL, result = NULL, finished_at = NULL, purge_at = NULL WHERE seq = ?
"""
_END = """
UPDATE record SET state = ?, result = ?, failures = ?, finished_at = ?, purge_at = ?, cancel = 0 WHERE seq = ?
"""

_failures = msgspec.json.Decoder(list[Failure])


def deliver(connection: sqlite3.Connection, now: float, claim: Claim) -> End | None:
    """See ``Store.deliver``."""
    row = _find(connection, claim)
    if row is None:
        message = claim.message
        due = message.not_before or message.created_at
        bindings = (message.topic, message.name, due, message.created_at, message.expires_at, message.result_ttl)
        connection.execute(_FOREIGN, (message.id, claim.subscription, *bindings))
        row = _find(connection, claim)
    seq, state, attempt, buried, cancel, copy, failures, confirmed = row
    ended = None if claim.replayed else _ended(claim, state, bool(buried), copy, failures)
    if ended is not None:
        return ended
    if cancel and not claim.replayed:
        connection.execute(_END, (CANCELLED, None, failures, now, _purge_at(connection, seq, now), seq))
        return Cancelled()
    if not confirmed and claim.message.idempotency_key is not None:
        # Its publisher may have died before it could: the key must not let another through.
        connection.execute("UPDATE dedup SET confirmed = 1 WHERE id = ?", (claim.message.id,))
    # Deaths are known only from what the broker counted; a retry has told its failure itself.
    lost = range(attempt, claim.attempt) if claim.suspect and state == RUNNING else ()
    history = _with(failures, (Failure(attempt=n, reason="worker_lost", failed_at=now) for n in lost))
    connection.execute(_RUN, (claim.attempt, claim.token, copy or claim.copy, history, now, seq))
    return None


def finish(connection: sqlite3.Connection, now: float, claim: Claim, end: End) -> bool:
    """See ``Store.finish``. Doing it twice with one end is fine: whoever got no answer tries again."""
    found = connection.execute(
        "SELECT seq, state, failures FROM record WHERE id = ? AND sub = ? AND token = ?",
        (claim.message.id, claim.subscription, claim.token),
    ).fetchone()
    if found is None:
        return False
    seq, state, failures = found
    if state != RUNNING:
        return True
    result, history = None, failures
    if isinstance(end, Done):
        state, result = SUCCEEDED, end.result
    elif isinstance(end, Buried):
        state, history = DEAD, _with(failures, [end.failure])
    else:
        state = CANCELLED
    # A dead letter is kept until somebody redrives or discards it, so its record is too.
    purge_at = None if state == DEAD else _purge_at(connection, seq, now)
    connection.execute(_END, (state, result, history, now, purge_at, seq))
    return True


def again(connection: sqlite3.Connection, now: float, claim: Claim, how: Again) -> None:
    """See ``Store.again``."""
    found = connection.execute(
        f"SELECT seq, attempt, failures FROM record WHERE id = ? AND sub = ? AND token = ? AND state = {RUNNING}",
        (claim.message.id, claim.subscription, claim.token),
    ).fetchone()
    if found is None:
        return
    seq, attempt, failures = found
    if how.failure is not None:
        attempt, failures = attempt + 1, _with(failures, [how.failure])
    connection.execute(
        f"UPDATE record SET state = {WAITING}, token = NULL, attempt = ?, failures = ?, due = ? WHERE seq = ?",
        (attempt, failures, now + how.delay, seq),
    )


def _find(connection: sqlite3.Connection, claim: Claim) -> Any:
    return connection.execute(_FIND, (claim.message.id, claim.subscription)).fetchone()


def _ended(claim: Claim, state: int, buried: bool, copy: str | None, failures: str) -> End | None:
    if copy is not None and copy != claim.copy:
        return Done()
    if state == SUCCEEDED:
        return Done()
    if state == CANCELLED:
        return Cancelled()
    if state == DEAD and not buried:
        return Buried(_failures.decode(failures)[-1])
    return None


def _purge_at(connection: sqlite3.Connection, seq: int, now: float) -> float:
    (result_ttl,) = connection.execute("SELECT result_ttl FROM record WHERE seq = ?", (seq,)).fetchone()
    return now + float(result_ttl)


def _with(failures: str, more: Iterable[Failure]) -> str:
    added = list(more)
    return failures if not added else msgspec.json.encode([*_failures.decode(failures), *added]).decode()
