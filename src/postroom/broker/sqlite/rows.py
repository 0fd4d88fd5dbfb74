"""Rows to values."""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec

from postroom.broker.sqlite import schema
from postroom.message import NO_HEADERS, DeadLetter, Failure, JobRecord, JobState, Message, Progress

MESSAGE = (
    "id, topic, name, body, headers, key, lane, created_at, not_before, expires_at, result_ttl, "
    "idempotency_key, dedup_window"
)
"""The columns :func:`message` takes, in this order."""

RECORD = (
    "m.seq, m.id, coalesce(s.name, ''), m.topic, m.name, m.state, m.failures, m.visible_at, m.created_at, "
    "m.not_before, m.started_at, m.finished_at, m.expires_at, m.progress, m.result, m.due"
)

_STATES = {
    schema.SUCCEEDED: JobState.SUCCEEDED,
    schema.DEAD: JobState.DEAD,
    schema.CANCELLED: JobState.CANCELLED,
    schema.EXPIRED: JobState.EXPIRED,
}

_headers = msgspec.json.Decoder(dict[str, str])
_failure = msgspec.json.Decoder(Failure)
_progress = msgspec.json.Decoder(Progress)


def message(row: Any) -> Message:
    """From the columns of ``MESSAGE``."""
    (job_id, topic, name, body, headers, key, lane, created_at, not_before, expires_at, result_ttl,
     idempotency_key, dedup_window) = row  # fmt: skip
    return Message(
        id=job_id,
        topic=topic,
        name=name,
        body=b"" if body is None else body,
        headers=_headers.decode(headers) if headers else NO_HEADERS,
        key=key,
        priority=-lane,
        created_at=created_at,
        not_before=not_before,
        expires_at=expires_at,
        result_ttl=result_ttl,
        idempotency_key=idempotency_key,
        dedup_window=dedup_window,
    )


def failures(connection: sqlite3.Connection, seq: int) -> tuple[Failure, ...]:
    """The history of a message, oldest first."""
    rows = connection.execute("SELECT failure FROM failure WHERE seq = ? ORDER BY number", (seq,))
    return tuple(_failure.decode(text) for (text,) in rows)


def add_failure(connection: sqlite3.Connection, seq: int, failure: Failure) -> None:
    """Append to the history of a message."""
    connection.execute(
        "INSERT INTO failure SELECT ?1, coalesce(max(number), 0) + 1, ?2 FROM failure WHERE seq = ?1",
        (seq, msgspec.json.encode(failure).decode()),
    )


def record(connection: sqlite3.Connection, row: Any, now: float) -> JobRecord:
    """From the columns of ``RECORD``."""
    (seq, job_id, sub, topic, name, state, failed, visible_at, created_at, not_before,
     started_at, finished_at, expires_at, progress, result, due) = row  # fmt: skip
    shown = _shown_state(state, failed, visible_at, due, now)
    waits = shown in (JobState.SCHEDULED, JobState.RETRYING)
    return JobRecord(
        id=job_id,
        subscription=sub,
        topic=topic,
        name=name,
        state=shown,
        attempt=max(1, failed) if state == schema.DEAD else failed + 1,
        created_at=created_at,
        not_before=(due if failed or not_before is None else not_before) if waits else None,
        started_at=started_at,
        finished_at=finished_at,
        expires_at=expires_at,
        progress=_progress.decode(progress) if progress and shown is JobState.RUNNING else None,
        result=result,
        failures=failures(connection, seq),
    )


def dead_letter(connection: sqlite3.Connection, row: Any, subscription: str) -> DeadLetter:
    """From ``seq, finished_at, redriven`` and the columns of ``MESSAGE``."""
    seq, dead_at, redriven, *columns = row
    return DeadLetter(
        message=message(columns),
        subscription=subscription,
        failures=failures(connection, seq),
        dead_at=dead_at,
        redriven=redriven,
    )


def _shown_state(state: int, failed: int, visible_at: float | None, due: float, now: float) -> JobState:
    if state in _STATES:
        return _STATES[state]
    if state == schema.LEASED:
        return JobState.RUNNING
    if failed:
        return JobState.RETRYING
    return JobState.SCHEDULED if due > now else JobState.READY
