"""What a message is on the server: a hash of fields with plain names, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from postroom.message import NO_HEADERS, DeadLetter, Failure, JobRecord, JobState, Message, Progress

Fields = Mapping[bytes, bytes]

_headers = msgspec.json.Decoder(dict[str, str])
_failure = msgspec.json.Decoder(Failure)
_progress = msgspec.json.Decoder(Progress)
_DEDUP_WINDOW = 86_400.0
_RESULT_TTL = 86_400.0


def escape(name: str) -> str:
    """A name as a part of a key, which a colon would end."""
    return name.replace("%", "%25").replace(":", "%3A")


def fields(message: Message) -> list[Any]:
    """Names and values in turn; what has its default is left out."""
    made: list[Any] = ["topic", message.topic, "type", message.name, "data", message.body]
    made += ("time", repr(message.created_at))
    if message.headers:
        made += ("headers", msgspec.json.encode(dict(message.headers)))
    if message.key is not None:
        made += ("key", message.key)
    if message.priority:
        made += ("priority", message.priority)
    if message.not_before is not None:
        made += ("not_before", repr(message.not_before))
    if message.expires_at is not None:
        made += ("expires", repr(message.expires_at))
    if message.idempotency_key is not None:
        made += ("idempotency_key", message.idempotency_key)
    if message.dedup_window != _DEDUP_WINDOW:
        made += ("dedup_window", repr(message.dedup_window))
    if message.result_ttl != _RESULT_TTL:
        made += ("result_ttl", repr(message.result_ttl))
    return made


def mapping(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """What a script answers for a hash."""
    pairs = iter(flat)
    return dict(zip(pairs, pairs, strict=True))


def message(message_id: str, stored: Fields) -> Message:
    """The message as it was published; what is missing, as somebody has deleted it, is empty."""
    get = stored.get
    headers, key, once = get(b"headers"), get(b"key"), get(b"idempotency_key")
    return Message(
        id=message_id,
        topic=get(b"topic", b"").decode(),
        name=get(b"type", b"").decode(),
        body=get(b"data", b""),
        headers=_headers.decode(headers) if headers else NO_HEADERS,
        key=None if key is None else key.decode(),
        priority=int(get(b"priority", 0)),
        created_at=float(get(b"time", 0)),
        not_before=_time(get(b"not_before")),
        expires_at=_time(get(b"expires")),
        idempotency_key=None if once is None else once.decode(),
        dedup_window=float(get(b"dedup_window", _DEDUP_WINDOW)),
        result_ttl=float(get(b"result_ttl", _RESULT_TTL)),
    )


def attempt(stored: Fields) -> int:
    return 1 + int(stored.get(b"failed", 0))


def failures(stored: Fields) -> tuple[Failure, ...]:
    told = stored.get(b"failures")
    return tuple(_failure.decode(line) for line in told.split(b"\n")) if told else ()


def letter(message_id: str, subscription: str, stored: Fields) -> DeadLetter:
    return DeadLetter(
        message=message(message_id, stored),
        subscription=subscription,
        failures=failures(stored),
        dead_at=float(stored.get(b"finished_at", 0)),
        redriven=int(stored.get(b"redriven", 0)),
    )


def record(message_id: str, subscription: str, stored: Fields, now: float) -> JobRecord:
    """``now``: by the clock of the server."""
    get = stored.get
    state, due = stored[b"state"].decode(), float(get(b"due", 0))
    waits = state == "waiting"
    if waits:
        state = "retrying" if int(get(b"failed", 0)) else "scheduled" if due > now else "ready"
    progress = get(b"progress")
    return JobRecord(
        id=message_id,
        subscription=subscription,
        topic=get(b"topic", b"").decode(),
        name=get(b"type", b"").decode(),
        state=JobState(state),
        attempt=attempt(stored),
        created_at=float(get(b"time", 0)),
        not_before=due if waits and due > now else None,
        started_at=_time(get(b"started_at")),
        finished_at=_time(get(b"finished_at")),
        expires_at=_time(get(b"expires")),
        progress=_progress.decode(progress) if progress else None,
        result=get(b"result"),
        failures=failures(stored),
    )


def _time(text: bytes | None) -> float | None:
    return None if text is None else float(text)
