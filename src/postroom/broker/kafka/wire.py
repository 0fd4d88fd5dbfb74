"""A message as a Kafka record, and back: the body as it is, all else in headers.

The names are those of the CloudEvents Kafka binding 1.0 (``ce_id``, ``ce_type``, ``ce_time``, ``content-type``);
what CloudEvents has no word for begins with ``postroom-``. Headers of the user keep their own names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from postroom.errors import MessageTooLarge, ValidationError
from postroom.message import NO_HEADERS, Failure, Message

MAX_BODY = 1_048_576
"""Bytes of body."""
MAX_RECORD = 2_097_152
"""Bytes of body and headers, also of other clients: ``max.message.bytes`` of every topic that is published to."""
MAX_HISTORY = 524_288
"""Bytes of failures; of more, the oldest tracebacks are cut."""
MAX_COPY = MAX_RECORD + 2 * MAX_HISTORY
"""The same of a subscription's own topics: what it cannot keep there could never be settled."""

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
        try:
            return msgspec.json.decode(self.history, type=list[Failure]) if self.history else []
        except (msgspec.MsgspecError, RecursionError):
            return []  # The words of a foreign client; its message is handled all the same.


_TOLD_ELSEWHERE = ("content-type", "ce_specversion", "ce_source")
_NUMBERS = {
    "priority": "postroom-priority",
    "not_before": "postroom-not-before",
    "expires_at": "postroom-expires",
    "dedup_window": "postroom-dedup-window",
    "result_ttl": "postroom-result-ttl",
}
_RESERVED = frozenset(
    {*_TOLD_ELSEWHERE, *_NUMBERS.values(), "ce_id", "ce_type", "ce_time", "postroom-topic", "postroom-headers"}
    | {"postroom-idempotency-key", "postroom-attempt", "postroom-redriven", "postroom-due", "postroom-failures"}
    | {"postroom-suspect", "postroom-replayed", "postroom-to", "postroom-state", "postroom-dead-at", "postroom-key"}
)


def message_record(message: Message, topic: str, partition: int = -1) -> Record:
    """As it is published. Raises ``MessageTooLarge``, or ``ValidationError`` for what is no text."""
    if len(message.body) > MAX_BODY:
        raise MessageTooLarge(
            f"message {message.id}: {len(message.body):,} bytes; Kafka topics take {MAX_BODY:,}. Store it elsewhere "
            "and send its address"
        )
    try:
        # The client crashes at a header's name that is no UTF-8.
        "".join(message.headers).encode()
        key = None if message.key is None else message.key.encode()
        return Record(topic, key, message.body, _message_headers(message), partition)
    except UnicodeEncodeError as error:
        raise ValidationError(f"message {message.id!r}: key, name or headers have a lone surrogate: {error}") from error


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
    same. ``topic``: what the name of its Kafka topic means; empty in a topic of a subscription's own, where each record
    says it. ``record``: a ``confluent_kafka.Message``."""
    found: dict[str, bytes | None] = dict(record.headers() or ())
    take = found.pop
    identity, name, created = take("ce_id", None), take("ce_type", None), take("ce_time", None)
    for told in _TOLD_ELSEWHERE:
        take(told, None)
    if not topic and "postroom-topic" in found:
        topic = _text(found, "postroom-topic")
    key = record.key()
    message = Message(
        id=identity.decode(errors="replace")
        if identity
        else f"{record.topic()}/{record.partition()}/{record.offset()}",
        topic=topic,
        name=name.decode(errors="replace") if name is not None else topic,
        body=record.value() or b"",
        key=None if key is None else key.decode(errors="replace"),
        created_at=_time(created or b"", record.timestamp()[1]),
        **(_uncommon(found) if found else {}),
    )
    if not found:
        return Envelope(message=message)
    return Envelope(
        message=message,
        attempt=max(1, int(_number(found, "postroom-attempt") or 1)),
        due=_number(found, "postroom-due") if "postroom-due" in found else message.not_before,
        history=found.get("postroom-failures") or b"",
        suspect="postroom-suspect" in found,
        replayed="postroom-replayed" in found,
        redriven=int(_number(found, "postroom-redriven") or 0),
        to=_text(found, "postroom-to") if "postroom-to" in found else None,
    )


def _uncommon(found: dict[str, bytes | None]) -> dict[str, Any]:
    """The fields of a message that most do not have."""
    fields: dict[str, Any] = {"headers": _user_headers(found)}
    if "postroom-idempotency-key" in found:
        fields["idempotency_key"] = _text(found, "postroom-idempotency-key")
    numbers = {field: _number(found, name) for field, name in _NUMBERS.items() if name in found}
    fields |= {field: value for field, value in numbers.items() if value is not None}
    if "priority" in fields:
        fields["priority"] = int(fields["priority"])
    return fields


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


def _user_headers(found: dict[str, bytes | None]) -> Mapping[str, str]:
    headers = {name: _text(found, name) for name in found if name not in _RESERVED}
    odd = found.get("postroom-headers")
    if odd:
        try:
            headers |= msgspec.json.decode(odd, type=dict[str, str])
        except msgspec.MsgspecError:
            headers["postroom-headers"] = _text(found, "postroom-headers")
    return headers or NO_HEADERS


def _text(found: dict[str, bytes | None], name: str) -> str:
    return (found[name] or b"").decode(errors="replace")


def _number(found: dict[str, bytes | None], name: str) -> float | None:
    """A header of a foreign client may say anything; what is no number is as if it were not there."""
    try:
        number = float(found.get(name) or b"")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _stamp(time: float) -> str:
    """RFC 3339 with seven digits: as many as it takes to get the very same ``float`` back."""
    whole = int(time)
    parts = round((time - whole) * 1e7)
    if parts == 10_000_000:
        whole, parts = whole + 1, 0
    return f"{_second(whole)}.{parts:07d}Z"


_STAMPS = (0.0, 253_402_214_400.0)
"""From 1970 to the last day but one of the year 9999."""


def _time(told: bytes, written: int) -> float:
    """``written``: when the record was, in milliseconds; it stands in for what is no time."""
    try:
        stamp = told.decode()
        if len(stamp) == 28 and stamp[19] == "." and stamp[27] == "Z":
            told_at = _unix(stamp[:19]) + int(stamp[20:27]) / 1e7
        else:
            told_at = datetime.fromisoformat(stamp).timestamp()
        # At the ends of the calendar it could not be written again, and the message not be settled.
        return told_at if _STAMPS[0] <= told_at < _STAMPS[1] else written / 1000
    except (ValueError, OverflowError):
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
