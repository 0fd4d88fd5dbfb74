"""A message as AMQP carries it.

The body stays what it is. ``message_id`` and ``type`` are the id and the name, headers stand under their own names
(a headers exchange filters by them), and the CloudEvents attributes are what other clients read and write. The header
``postroom`` is the whole truth about the rest, as JSON; ``postroom-failures`` is the history.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from pika import BasicProperties  # type: ignore[import-untyped]

from postroom.broker.amqp.address import SHELF
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.frames import text_of
from postroom.errors import EncodeError, MessageTooLarge
from postroom.message import MAX_PRIORITY, NO_HEADERS, Failure, Message

MAX_BODY = 16 * 1024 * 1024
"""Bytes; what a server takes unless told otherwise (rabbitmq.com/docs/configure, ``max_message_size``, since 4.0)."""
MAX_HEADERS = 96 * 1024
"""Bytes of a message's headers as they travel: with the history they must fit into one frame of 128 KiB
(``frame_max``), for a larger one the server closes the connection, under everybody who publishes on it."""
MAX_SHORT = 255
"""Bytes of what AMQP calls a short string: properties, names of headers, routing keys."""

_LAST_DAY = 253_402_300_800
"""Unix time at which the year 9999 ends, the last one that Python knows."""
_PERSISTENT = 2
_PLAIN_PRIORITY = 4
"""What RabbitMQ 4.3 takes a message for that names none: those stay as they are, and the urgent stand above them."""
_OURS = ("postroom", "postroom-failures")
_MARK = "postroom-end"
_USUAL = (
    frozenset(_OURS)
    | {f"cloudEvents_{name}" for name in ("specversion", "id", "source", "type")}
    | {"x-delivery-count"}
)


class Envelope(msgspec.Struct, omit_defaults=True, kw_only=True):
    """All of a message that is in no property, and what has become of this copy so far."""

    topic: str
    created_at: Annotated[float, msgspec.Meta(lt=_LAST_DAY)] = 0.0
    key: str | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)] = 0
    not_before: float | None = None
    expires_at: float | None = None
    idempotency_key: str | None = None
    dedup_window: float = 86_400.0
    result_ttl: float = 86_400.0
    id: str | None = None
    name: str | None = None
    """These two only where they do not fit into their properties."""
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """Those whose names AMQP cannot carry, or that could be mistaken for the server's or our own."""
    counted: int = 0
    """Failures since it was published, or last redriven."""
    suspect: bool = False
    due: float | None = None
    """Not to be handed out before this unix time, where the server could not delay it for so long."""
    replayed: bool = False
    redriven: int = 0
    dead_at: float | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Envelope).decode


def properties_of(copy: Copy) -> Any:
    """The properties of ``copy``. Raises ``EncodeError``."""
    message = copy.message
    envelope = Envelope(
        topic=message.topic,
        created_at=message.created_at,
        key=message.key,
        priority=message.priority,
        not_before=message.not_before,
        expires_at=message.expires_at,
        idempotency_key=message.idempotency_key,
        dedup_window=message.dedup_window,
        result_ttl=message.result_ttl,
        counted=copy.counted,
        suspect=copy.suspect,
        due=copy.due,
        replayed=copy.replayed,
        redriven=copy.redriven,
        dead_at=copy.dead_at,
    )
    try:
        headers, kind = _headers(message, envelope)
        headers["postroom"] = _encode(envelope).decode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"message {message.id!r}: half a surrogate pair is no text ({error})") from error
    if copy.packed:
        headers["postroom-failures"] = copy.packed
    return BasicProperties(
        content_type="application/json",
        delivery_mode=_PERSISTENT,
        message_id=None if envelope.id else message.id,
        # Dead letters lie in the order of their deaths.
        priority=_PLAIN_PRIORITY + message.priority if message.priority and copy.dead_at is None else None,
        type=kind,
        timestamp=int(message.created_at) if message.created_at > 0 else None,
        headers=headers,
    )


def _headers(message: Message, envelope: Envelope) -> tuple[dict[str, Any], str | None]:
    """The headers, and what fits of the name into the property ``type``; the rest goes into ``envelope``."""
    kind: str | None = message.name
    if len(message.name.encode()) > MAX_SHORT:
        envelope.name, kind = message.name, None
    if len(message.id.encode()) > MAX_SHORT:
        envelope.id = message.id
    headers: dict[str, Any] = {}
    for name, value in message.headers.items():
        value.encode()  # What is no text is told here, not by pika in the midst of writing.
        (headers if can_be_shown(name) else envelope.headers)[name] = value
    headers["cloudEvents_specversion"] = "1.0"
    headers["cloudEvents_id"] = message.id
    headers["cloudEvents_source"] = message.topic
    headers["cloudEvents_type"] = message.name
    return headers, kind


def check_size(message: Message, properties: Any) -> None:
    """Raises ``MessageTooLarge``."""
    size = _size(properties)
    if size > MAX_HEADERS:
        raise MessageTooLarge(
            f"message {message.id} has {size:,} bytes of headers as they travel; {MAX_HEADERS:,} fit into a frame of "
            "RabbitMQ; move the large ones into the body"
        )


def _size(properties: Any) -> int:
    """Bytes of its headers. What stands in ours is JSON there, up to six times as long as it was."""
    return sum(len(name.encode()) + len(value.encode()) + 6 for name, value in properties.headers.items())


def mark(mark_id: str) -> Any:
    """The properties of a message that stands for the end of a queue or stream; it has no body."""
    return BasicProperties(message_id=mark_id, type=_MARK, delivery_mode=_PERSISTENT)


def is_mark(properties: Any, body: bytes) -> bool:
    """Whether it is one: jobs, events and those of other clients may have that name too, and are no marks for it."""
    return properties.type == _MARK and not body and "postroom" not in (properties.headers or {})


def can_be_shown(name: str) -> bool:
    """Whether a header may stand under its own name: not one of ours, nor of the server's, which begin with x-."""
    return bool(name) and not name.startswith(("x-", "cloudEvents", "postroom")) and len(name.encode()) <= MAX_SHORT


def read(properties: Any, body: bytes, topic: Callable[[], str], *, is_again: bool = False) -> Copy:
    """What came from the server, ours or of another client.

    ``topic()``: where it was published. ``is_again``: it was handed over before, says the server.
    """
    headers: dict[str, Any] = properties.headers or {}
    ours = headers.get("postroom")
    if isinstance(ours, str):
        try:
            envelope = _decode(ours)
        except msgspec.DecodeError:
            # Somebody else's header of that name: the message must not be lost for it.
            return _foreign(properties, headers, body, topic(), is_again)
        return _ours(properties, headers, body, envelope, is_again)
    return _foreign(properties, headers, body, topic(), is_again)


def _ours(properties: Any, headers: dict[str, Any], body: bytes, envelope: Envelope, is_again: bool) -> Copy:
    # As a rule there is nothing but what we have put there ourselves.
    is_plain = headers.keys() <= _USUAL
    shown = {} if is_plain else _shown(headers)
    if envelope.headers:
        shown |= envelope.headers
    message = Message(
        id=text_of(properties.message_id or envelope.id or ""),
        topic=envelope.topic,
        name=text_of(properties.type or envelope.name or ""),
        body=body,
        headers=shown or NO_HEADERS,
        key=envelope.key,
        priority=envelope.priority,
        created_at=envelope.created_at,
        not_before=envelope.not_before,
        expires_at=envelope.expires_at,
        idempotency_key=envelope.idempotency_key,
        dedup_window=envelope.dedup_window,
        result_ttl=envelope.result_ttl,
    )
    return Copy(
        message=message,
        counted=envelope.counted,
        suspect=envelope.suspect,
        due=envelope.due,
        replayed=envelope.replayed,
        redriven=envelope.redriven,
        dead_at=envelope.dead_at,
        deaths=_deaths(headers, is_again),
        packed=_history(headers),
        # Another client may have passed it on, with headers of its own.
        oversized=not is_plain and _size_of(message) > MAX_HEADERS,
    )


def _history(headers: Mapping[str, Any]) -> str | bytes:
    packed = headers.get("postroom-failures", "")
    return packed if isinstance(packed, str | bytes) else ""


def _foreign(properties: Any, headers: dict[str, Any], body: bytes, topic: str, is_again: bool) -> Copy:
    headers = {text_of(name): value for name, value in headers.items()}
    events = {
        name[12:]: _text(value) for name, value in headers.items() if name[:12] in ("cloudEvents_", "cloudEvents:")
    }
    message_id = text_of(properties.message_id or events.get("id") or "")
    name = text_of(events.get("type") or properties.type or topic)
    created_at = float(properties.timestamp or 0) or _seconds(events.get("time"))
    message = Message(
        # Only looked at, in a queue of dead letters, without ever having been handed out.
        id=message_id or sha256(name.encode() + body).hexdigest()[:32],
        topic=topic,
        name=name,
        body=body,
        headers=_shown(headers) or NO_HEADERS,
        key=events.get("partitionkey"),
        # Some count milliseconds.
        created_at=created_at if 0 < created_at < _LAST_DAY else time.time(),
    )
    return Copy(
        message=message,
        deaths=_deaths(headers, is_again),
        nameless=not message_id,
        oversized=_size_of(message) > MAX_HEADERS,
    )


def _size_of(message: Message) -> int:
    return _size(properties_of(Copy(message=message)))


def _shown(headers: Mapping[Any, Any]) -> dict[str, str]:
    named = ((text_of(name), value) for name, value in headers.items())
    return {name: _text(value) for name, value in named if not _is_reserved(name)}


def named(copy: Copy, message_id: str) -> Copy:
    """``copy`` under an id that it keeps."""
    return msgspec.structs.replace(copy, message=msgspec.structs.replace(copy.message, id=message_id))


def read_dead(properties: Any, body: bytes, topic: Callable[[], str]) -> Copy:
    """A dead letter. There the server counts how often it was looked at: that is no death."""
    copy = msgspec.structs.replace(read(properties, body, topic), deaths=0)
    if copy.dead_at is not None:
        return copy
    # The server itself has dead-lettered it: it has killed its holders faster than any of them could settle it.
    reason, died_at = _death(properties.headers or {})
    told = Failure(
        attempt=copy.attempt,
        # Or by the policy, or the ``expiration``, of somebody else.
        reason="undecodable" if copy.oversized else "worker_lost" if reason == "delivery_limit" else "rejected",
        message=(
            f"its headers would have {_size_of(copy.message):,} bytes; Postroom can keep {MAX_HEADERS:,}"
            if copy.oversized
            else f"RabbitMQ dead-lettered it: {reason}"
        ),
        failed_at=died_at or copy.message.created_at,
    )
    return msgspec.structs.replace(copy.buried(told, told.failed_at), nameless=copy.nameless)


def _death(headers: Mapping[str, Any]) -> tuple[str, float]:
    deaths = headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[0], Mapping):
        return "another client put it there", 0.0
    at = deaths[0].get("time")
    return str(deaths[0].get("reason")), at.timestamp() if isinstance(at, datetime) else 0.0


def _is_reserved(name: str) -> bool:
    return name in _OURS or name.startswith(("x-", "cloudEvents"))


def _deaths(headers: Mapping[str, Any], is_again: bool) -> int:
    """How often it came back from a holder. We give back by copies only, so each time the holder died or froze.

    RabbitMQ 4.3 counts every return in ``x-acquired-count`` and only failures in ``x-delivery-count``; older servers
    have only the latter, and count every return there (rabbitmq.com/docs/quorum-queues, "Poison message handling").
    What is handed over for the first time may have such headers of another queue, from whoever has passed it on.
    """
    told = (headers.get("x-acquired-count") or headers.get("x-delivery-count")) if is_again else 0
    counted = told if isinstance(told, int) else 0
    if "x-death" not in headers or SHELF not in str(_last_queue(headers)):
        return counted
    # From a shelf it comes only if the holder who had put it there is no more. RabbitMQ 4.3 goes on with its count.
    return max(1, counted) if "x-acquired-count" in headers else counted + 1


def _last_queue(headers: Mapping[str, Any]) -> Any:
    deaths = headers["x-death"]
    return deaths[0].get("queue") if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(msgspec.json.decode(_encode_any(value))) if isinstance(value, bytes) else _encode_any(value).decode()


def _encode_any(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)


def _seconds(time: str | None) -> float:
    try:
        return datetime.fromisoformat(time).timestamp() if time else 0.0
    except ValueError:
        return 0.0
