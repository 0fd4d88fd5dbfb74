"""A message as a Kafka record, and back: the body as it is, all else in headers.

The names are those of the CloudEvents Kafka binding 1.0 (``ce_id``, ``ce_type``, ``ce_time``, ``content-type``);
what CloudEvents has no word for begins with ``postroom-``. Headers of the user keep their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from postroom.errors import MessageTooLarge
from postroom.message import NO_HEADERS, Failure, Message

MAX_BODY = 1_048_576
"""Bytes of body."""
MAX_RECORD = 2_097_152
"""Bytes of body, headers and history: ``max.message.bytes`` of every topic made here."""
MAX_HISTORY = 524_288
"""Bytes of failures; of more, the oldest tracebacks are cut."""

Headers = list[tuple[str, str | bytes | None]]


class Record(NamedTuple):
    """What is sent."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int = -1
    """-1: by the key."""


class Envelope(msgspec.Struct, kw_only=True, frozen=True):
    """A message and what has happened to it so far."""

    message: Message
    attempt: int = 1
    """The next one."""
    due: float | None = None
    """Not before this unix time."""
    history: bytes = b""
    """Its failures as JSON; read only if there is another."""
    suspect: bool = False
    replayed: bool = False
    redriven: int = 0
    to: str | None = None
    """Only for this subscription."""

    def failures(self) -> list[Failure]:
        return msgspec.json.decode(self.history, type=list[Failure]) if self.history else []


_INT = {"attempt": "postroom-attempt", "redriven": "postroom-redriven"}
_RESERVED = frozenset(
    {"content-type", "ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "postroom-topic", "postroom-headers"}
    | {"postroom-priority", "postroom-not-before", "postroom-expires", "postroom-idempotency-key"}
    | {"postroom-dedup-window", "postroom-result-ttl", "postroom-due", "postroom-failures", "postroom-suspect"}
    | {"postroom-replayed", "postroom-to", "postroom-state", "postroom-dead-at", "postroom-key"}
    | set(_INT.values())
)


def message_record(message: Message, topic: str, partition: int = -1) -> Record:
    """As it is published. Raises ``MessageTooLarge``."""
    if len(message.body) > MAX_BODY:
        raise MessageTooLarge(
            f"message {message.id}: {len(message.body):,} bytes; Kafka topics take {MAX_BODY:,}. Store it elsewhere "
            "and send its address"
        )
    key = None if message.key is None else message.key.encode()
    return Record(topic, key, message.body, _message_headers(message), partition)


def envelope_record(envelope: Envelope, topic: str, more: Headers | None = None, partition: int = -1) -> Record:
    """A copy for one subscription, with its history."""
    message = envelope.message
    headers = [*_message_headers(message), ("postroom-topic", message.topic.encode())]
    headers.append(("postroom-attempt", str(envelope.attempt).encode()))
    if envelope.redriven:
        headers.append(("postroom-redriven", str(envelope.redriven).encode()))
    if envelope.due is not None:
        headers.append(("postroom-due", repr(envelope.due).encode()))
    if envelope.history:
        headers.append(("postroom-failures", envelope.history))
    headers += [(name, b"1") for name, set_ in _flags(envelope) if set_]
    if envelope.to is not None:
        headers.append(("postroom-to", envelope.to.encode()))
    key = None if message.key is None else message.key.encode()
    return Record(topic, key, message.body, headers + (more or []), partition)


def history(failures: list[Failure]) -> bytes:
    """As JSON, within ``MAX_HISTORY``: of a longer one the oldest tracebacks go first, then the oldest failures."""
    text = msgspec.json.encode(failures)
    kept = list(failures)
    for number, failure in enumerate(kept):
        if len(text) <= MAX_HISTORY:
            return text
        kept[number] = msgspec.structs.replace(failure, traceback="", message=failure.message[:1000])
        text = msgspec.json.encode(kept)
    while len(text) > MAX_HISTORY:
        del kept[0]
        text = msgspec.json.encode(kept)
    return text


def read(record: Any, topic: str) -> Envelope:
    """Of a record of ours or of anybody: what a foreign one does not say is derived from where it lies, for ever the
    same. ``topic``: what the name of its Kafka topic means. ``record``: a ``confluent_kafka.Message``."""
    found: dict[str, bytes] = {name: value or b"" for name, value in record.headers() or ()}
    take = found.pop
    identity = take("ce_id", None)
    created, due = take("ce_time", None), take("postroom-due", None)
    not_before, key = _number(take("postroom-not-before", None), None), record.key()
    name = take("ce_type", None)
    topic = take("postroom-topic", topic.encode()).decode()
    priority, expires = take("postroom-priority", None), take("postroom-expires", None)
    unusual: dict[str, Any] = {}
    if "postroom-idempotency-key" in found:
        unusual["idempotency_key"] = take("postroom-idempotency-key").decode()
    if "postroom-dedup-window" in found:
        unusual["dedup_window"] = _number(take("postroom-dedup-window"), 86_400.0)
    if "postroom-result-ttl" in found:
        unusual["result_ttl"] = _number(take("postroom-result-ttl"), 86_400.0)
    message = Message(
        id=identity.decode(errors="replace")
        if identity
        else f"{record.topic()}/{record.partition()}/{record.offset()}",
        topic=topic,
        name=name.decode(errors="replace") if name is not None else topic,
        body=record.value() or b"",
        headers=_user_headers(found),
        key=None if key is None else key.decode(errors="replace"),
        priority=int(_number(priority, 0.0) or 0),
        created_at=_time(created or b"", record.timestamp()[1]),
        not_before=not_before,
        expires_at=_number(expires, None),
        **unusual,
    )
    return Envelope(
        message=message,
        attempt=int(_number(found.get("postroom-attempt"), 1.0) or 1),
        due=_number(due, None) if due is not None else not_before,
        history=found.get("postroom-failures", b""),
        suspect="postroom-suspect" in found,
        replayed="postroom-replayed" in found,
        redriven=int(_number(found.get("postroom-redriven"), 0.0) or 0),
        to=found["postroom-to"].decode() if "postroom-to" in found else None,
    )


def header(record: Any, name: str) -> bytes | None:
    """One header of a record."""
    return next((value for found, value in record.headers() or () if found == name), None)


def _flags(envelope: Envelope) -> list[tuple[str, bool]]:
    return [("postroom-suspect", envelope.suspect), ("postroom-replayed", envelope.replayed)]


def _message_headers(message: Message) -> Headers:
    headers: Headers = [
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_id", message.id.encode()),
        ("ce_type", message.name.encode()),
        ("ce_source", b"/postroom/" + message.topic.encode()),
        ("ce_time", _stamp(message.created_at).encode()),
    ]
    if message.headers:
        odd = {name: value for name, value in message.headers.items() if name in _RESERVED or "\0" in name}
        headers += [(name, value.encode()) for name, value in message.headers.items() if name not in odd]
        if odd:
            headers.append(("postroom-headers", msgspec.json.encode(odd)))
    if message.not_before is not None:
        headers.append(("postroom-not-before", repr(message.not_before).encode()))
    if message.expires_at is not None:
        headers.append(("postroom-expires", repr(message.expires_at).encode()))
    if message.priority:
        headers.append(("postroom-priority", str(message.priority).encode()))
    if message.idempotency_key is not None:
        headers.append(("postroom-idempotency-key", message.idempotency_key.encode()))
        headers.append(("postroom-dedup-window", repr(message.dedup_window).encode()))
    if message.result_ttl != 86_400.0:
        headers.append(("postroom-result-ttl", repr(message.result_ttl).encode()))
    return headers


def _user_headers(found: dict[str, bytes]) -> Mapping[str, str]:
    odd = found.get("postroom-headers")
    headers = {name: value.decode(errors="replace") for name, value in found.items() if name not in _RESERVED}
    if odd:
        headers |= msgspec.json.decode(odd, type=dict[str, str])
    return headers or NO_HEADERS


def _number(text: bytes | None, default: float | None) -> float | None:
    """A header of a foreign client may say anything; what is no number is as if it were not there."""
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        return default


def _stamp(time: float) -> str:
    """RFC 3339 with seven digits: as many as it takes to get the very same ``float`` back."""
    whole = int(time)
    parts = round((time - whole) * 1e7)
    if parts == 10_000_000:
        whole, parts = whole + 1, 0
    return f"{_second(whole)}.{parts:07d}Z"


def _time(told: bytes, written: int) -> float:
    """``written``: when the record was, in milliseconds; it stands in for what is no time."""
    try:
        stamp = told.decode()
        if len(stamp) == 28 and stamp[19] == "." and stamp[27] == "Z":
            return _unix(stamp[:19]) + int(stamp[20:27]) / 1e7
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return written / 1000


@lru_cache(maxsize=64)
def _second(whole: int) -> str:
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=64)
def _unix(stamp: str) -> int:
    return int(datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp())


def changed(envelope: Envelope, changes: dict[str, Any]) -> Envelope:
    made: Envelope = msgspec.structs.replace(envelope, **changes)
    return made


def worker_lost(attempt: int, now: float) -> Failure:
    """The failure that nobody could tell."""
    return Failure(
        attempt=attempt,
        reason="worker_lost",
        message="the lease ended while the handler ran: its worker died or was frozen",
        failed_at=now,
    )
