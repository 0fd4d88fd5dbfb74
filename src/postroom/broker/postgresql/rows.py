"""Rows to values, and values to what the functions of the database take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from postroom.broker.base import Ack, Dead, Outcome, Release, Retry
from postroom.message import NO_HEADERS, DeadLetter, Failure, JobRecord, JobState, Message, Progress

# What a row is, of those kept and those remembered.
WAITING, LEASED, SUCCEEDED, DEAD, CANCELLED, EXPIRED = range(6)

MESSAGE = (
    "id, topic, name, body, headers, key, priority, created_at, not_before, expires_at, result_ttl, idempotency_key, "
    "dedup_window"
)
"""The columns :func:`message` takes, in this order."""

_STATES = {
    SUCCEEDED: JobState.SUCCEEDED,
    DEAD: JobState.DEAD,
    CANCELLED: JobState.CANCELLED,
    EXPIRED: JobState.EXPIRED,
    LEASED: JobState.RUNNING,
}

_headers = msgspec.json.Decoder(dict[str, str])
_failure = msgspec.json.Decoder(Failure)
_progress = msgspec.json.Decoder(Progress)
_plain = msgspec.json.Encoder()
# Headers may be any mapping.
_batch = msgspec.json.Encoder(enc_hook=dict)


class _Acked(msgspec.Struct, omit_defaults=True):
    place: int
    id: str
    lease: int
    result: bytes | None = None


class _Other(msgspec.Struct, omit_defaults=True):
    place: int
    id: str
    lease: int
    verb: str
    delay: float = 0.0
    suspect: bool | None = None
    failure: str | None = None


def batch(messages: Any) -> str:
    """As ``publish`` takes them."""
    return _batch.encode(messages).decode()


def outcomes(settlements: list[tuple[str, int, Outcome]]) -> tuple[str, str | None]:
    """As ``settle`` takes them: of each message its id, its lease and what becomes of it."""
    acks: list[_Acked] = []
    others: list[_Other] = []
    for place, (message_id, lease, outcome) in enumerate(settlements):
        if isinstance(outcome, Ack):
            acks.append(_Acked(place, message_id, lease, outcome.result))
        else:
            others.append(_other(place, message_id, lease, outcome))
    return _plain.encode(acks).decode(), _plain.encode(others).decode() if others else None


def _other(place: int, message_id: str, lease: int, outcome: Outcome) -> _Other:
    if isinstance(outcome, Retry):
        failure = _plain.encode(outcome.failure).decode()
        return _Other(place, message_id, lease, "retry", outcome.delay, outcome.suspect, failure)
    if isinstance(outcome, Release):
        return _Other(place, message_id, lease, "release", outcome.delay)
    if isinstance(outcome, Dead):
        return _Other(place, message_id, lease, "dead", failure=_plain.encode(outcome.failure).decode())
    return _Other(place, message_id, lease, "cancel")


def message(row: Any) -> Message:
    """From the columns of ``MESSAGE``."""
    (message_id, topic, name, body, headers, key, priority, created_at, not_before, expires_at, result_ttl,
     idempotency_key, dedup_window) = row  # fmt: skip
    return Message(
        id=message_id,
        topic=topic,
        name=name,
        body=body,
        headers=_decode_headers(headers),
        key=key,
        priority=priority,
        created_at=created_at,
        not_before=not_before,
        expires_at=expires_at,
        result_ttl=result_ttl,
        idempotency_key=idempotency_key,
        dedup_window=dedup_window,
    )


def _decode_headers(text: str | None) -> Mapping[str, str]:
    return NO_HEADERS if text is None else _headers.decode(text)


def dead_letter(row: Any, subscription: str) -> DeadLetter:
    """From ``dead_at, redriven, failures`` and the columns of ``MESSAGE``."""
    dead_at, redriven, failures, *columns = row
    return DeadLetter(
        message=message(columns),
        subscription=subscription,
        failures=_history(failures),
        dead_at=dead_at,
        redriven=redriven,
    )


KEPT = """
SELECT m.seq, m.id, coalesce(s.name, '') AS sub, m.topic, m.name, m.state,
    CASE WHEN m.state = 3 THEN greatest(1, m.failed) ELSE m.failed + 1 END AS attempt,
    m.due, m.due > ~.instant($1) AS ahead, m.created_at, m.not_before, m.started_at, m.dead_at AS finished_at,
    m.expires_at, m.progress, NULL::bytea AS result, m.failures
FROM ~.message m JOIN ~.subscription s ON s.id = m.sub
"""
REMEMBERED = """
SELECT r.seq, r.id, coalesce(s.name, '') AS sub, r.topic, r.name, r.state, r.attempt,
    0::float8 AS due, false AS ahead, r.created_at, NULL::float8 AS not_before, r.started_at, r.finished_at,
    r.expires_at, NULL::text AS progress, r.result, r.failures
FROM ~.record r LEFT JOIN ~.subscription s ON s.id = r.sub
"""
"""What :func:`record` takes, of those kept and of those remembered; ``$1`` is the time if it is not the server's."""


def record(row: Any) -> JobRecord:
    """From the columns of ``KEPT`` or ``REMEMBERED``."""
    (_, message_id, sub, topic, name, state, attempt, due, ahead, created_at, not_before, started_at, finished_at,
     expires_at, progress, result, failures) = row  # fmt: skip
    shown = _STATES.get(state) or _waiting(attempt, ahead)
    waits = shown in (JobState.SCHEDULED, JobState.RETRYING)
    return JobRecord(
        id=message_id,
        subscription=sub,
        topic=topic,
        name=name,
        state=shown,
        attempt=attempt,
        created_at=created_at,
        not_before=(due if attempt > 1 or not_before is None else not_before) if waits else None,
        started_at=started_at,
        finished_at=finished_at,
        expires_at=expires_at,
        progress=_progress.decode(progress) if progress and shown is JobState.RUNNING else None,
        result=result,
        failures=_history(failures),
    )


def _history(texts: list[str] | None) -> tuple[Failure, ...]:
    return tuple(_failure.decode(text) for text in texts or ())


def _waiting(attempt: int, ahead: bool) -> JobState:
    if attempt > 1:
        return JobState.RETRYING
    return JobState.SCHEDULED if ahead else JobState.READY
