"""A message as the service carries it: text, and at most ten attributes.

The body stays what it is wherever the service takes it. The attribute ``postroom`` is the whole truth about the rest,
as JSON. Beside it stand what other clients read and write: the CloudEvents attributes ``ce-…``, and headers under
their own names as far as there is room, by which SNS filters.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Any

import msgspec

from postroom.errors import EncodeError, MessageTooLarge
from postroom.message import NO_HEADERS, DeadLetter, Failure, Message

MOST_BYTES = 1_048_576
"""Of body and attributes, of one message and of one batch (SQS Developer Guide, "Message quotas")."""
MOST_BODY = 655_360
"""Bytes of a body: even if it goes as base64 there is room for 64 KiB of metadata, and for its failures."""
HISTORY_ROOM = 16_384
"""Kept free when a message is first sent, so that it can always carry its failures."""
MAX_DELAY = 900
"""Seconds a message can be delayed at once (SendMessage, ``DelaySeconds``)."""
UNFILTERED = "postroom-unfiltered"
"""Marks a message whose headers are not all attributes: SNS lets it through, the consumer filters."""

_KEY = "key:"
_HEADERS_SHOWN = 4  # Of ten attributes six are taken.
_LONGEST_SHOWN = 1024
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SendMessage refuses in a body and in an attribute."""
_ATTRIBUTE = re.compile(
    r"(?!(?:aws|amazon)\.|ce-|postroom)(?!.*\.\.)[A-Za-z0-9_-](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_-])?", re.I
)
_TOKEN = re.compile(r"[!-~]{1,120}")

Attributes = dict[str, dict[str, str]]


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of a message but its body, and what has become of this copy so far."""

    id: str
    topic: str
    name: str
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    key: str | None = None
    priority: int = 0
    created_at: float = 0.0
    not_before: float | None = None
    expires_at: float | None = None
    idempotency_key: str | None = None
    dedup_window: float = 86_400.0
    result_ttl: float = 86_400.0
    base64: bool = False
    """The body is bytes that the service does not take as text."""
    counted: int = 0
    """Failures since it was published, or last redriven."""
    failures: tuple[Failure, ...] = ()
    suspect: bool = False
    due: float | None = None
    """Not to be handed out before this unix time."""
    everlasting: bool = False
    """It was redriven: ``expires_at`` no longer holds."""
    redriven: int = 0
    dead_at: float | None = None


_COPIED = [name for name in Message.__struct_fields__ if name in Envelope.__struct_fields__]
"""The rest is for the store beside, which has heeded it by then."""


class Copy:
    """One message, packed. It does not change."""

    def __init__(self, text: str, envelope: Envelope) -> None:
        self.text = text
        self.envelope = envelope

    @cached_property
    def attributes(self) -> Attributes:
        return attributes_of(self.envelope)

    @cached_property
    def size(self) -> int:
        return _size(self.text, self.attributes)

    def changed(self, **fields: Any) -> Copy:
        """With another fate. Of too long a history the oldest tracebacks are cut first, then texts, then failures."""
        return _fitted(Copy(self.text, msgspec.structs.replace(self.envelope, **fields)))

    def redriven(self) -> Copy:
        """A dead letter as it comes again: attempts from 1, its history kept, and no longer able to expire."""
        again = self.envelope.redriven + 1
        return self.changed(counted=0, redriven=again, dead_at=None, due=None, suspect=False, everlasting=True)


def pack(message: Message, limit: int = MOST_BYTES) -> Copy:
    """Raises ``MessageTooLarge`` and ``EncodeError``."""
    if len(message.body) > MOST_BODY:
        raise MessageTooLarge(
            f"message {message.id} has a body of {len(message.body):,} bytes; {MOST_BODY:,} are taken; "
            "pass a reference to the data"
        )
    text, is_binary = _as_text(message.body)
    fields = {name: getattr(message, name) for name in _COPIED}
    fields["headers"] = dict(message.headers)
    copy = Copy(text, Envelope(**fields, base64=is_binary, due=message.not_before))
    try:
        size = copy.size
    except UnicodeEncodeError as error:
        raise EncodeError(f"message {message.id!r}: half a surrogate pair is no text ({error})") from error
    room = min(limit, MOST_BYTES - HISTORY_ROOM)
    if size > room:
        raise MessageTooLarge(
            f"message {message.id} has {size:,} bytes with its metadata; {room:,} fit; pass a reference to the data"
        )
    return copy


def unpack(text: str, envelope: Envelope) -> Message:
    try:
        body = base64.b64decode(text) if envelope.base64 else text.encode()
    except ValueError:
        # Another client's: whoever decodes it will say so, and it becomes a dead letter.
        body = text.encode()
    fields = {name: getattr(envelope, name) for name in _COPIED}
    fields["headers"] = envelope.headers or NO_HEADERS
    return Message(**fields, body=body)


def letter(subscription: str, copy: Copy, dead_at: float) -> DeadLetter:
    envelope = copy.envelope
    return DeadLetter(
        message=unpack(copy.text, envelope),
        subscription=subscription,
        failures=envelope.failures,
        dead_at=dead_at if envelope.dead_at is None else envelope.dead_at,
        redriven=envelope.redriven,
    )


def attributes_of(envelope: Envelope) -> Attributes:
    values = {
        "postroom": _legal_json(envelope),
        "ce-specversion": "1.0",
        "ce-id": envelope.id,
        "ce-source": envelope.topic,
        "ce-type": envelope.name,
        "ce-time": _time(envelope.created_at),
    }
    headers = envelope.headers
    if len(headers) <= _HEADERS_SHOWN and all(_can_be_shown(name, value) for name, value in headers.items()):
        values.update(headers)
    else:
        values[UNFILTERED] = "1"
    return {
        name: {"DataType": "String", "StringValue": value}
        for name, value in values.items()
        if value and not _ILLEGAL.search(value)
    }


def read(text: str, attributes: Mapping[str, Mapping[str, Any]], identity: str, topic: str, group: str | None) -> Copy:
    """What came from the service, ours or of another client.

    ``identity``: the service's own id for it, ``topic`` and ``group``: where it was found; they stand in for what
    another client left out.
    """
    values = {
        name: str(value["StringValue"]) if "StringValue" in value else base64.b64encode(value["BinaryValue"]).decode()
        for name, value in attributes.items()
    }
    ours = values.get("postroom")
    if ours is not None:
        try:
            return Copy(text, msgspec.json.decode(ours, type=Envelope))
        except (msgspec.DecodeError, RecursionError):
            # Somebody else's attribute of that name: the message must not be lost for it.
            pass
    return Copy(
        text,
        Envelope(
            id=values.get("ce-id", identity),
            topic=topic,
            name=values.get("ce-type", topic),
            headers={name: value for name, value in values.items() if not name.startswith("ce-")},
            key=values.get("ce-partitionkey", group and group.removeprefix(_KEY)),
            created_at=_seconds(values.get("ce-time")),
        ),
    )


def entry(copy: Copy, *, fifo: bool, delay: float = 0.0, origin: str = "", alone: bool = False) -> dict[str, Any]:
    """An entry of ``SendMessageBatch``, without its ``Id``.

    ``origin``: the service's own id of what it is a copy of, and of which it shall be the only one. ``alone``: it waits
    for no other of its key, as a dead letter, of which nobody could see more than ten of one key otherwise.
    """
    made: dict[str, Any] = {"MessageBody": copy.text, "MessageAttributes": copy.attributes}
    if fifo:
        key, message_id = copy.envelope.key, copy.envelope.id
        made["MessageGroupId"] = _token(f"id:{message_id}" if key is None or alone else f"{_KEY}{key}")
        made["MessageDeduplicationId"] = _token(f"{message_id}.{origin}" if origin else message_id)
    elif delay > 0:
        # Rounded up, as the service counts in whole seconds: never early.
        made["DelaySeconds"] = min(MAX_DELAY, int(-(-delay // 1)))
    return made


def size_of(entry: Mapping[str, Any]) -> int:
    return _size(entry.get("MessageBody") or entry["Message"], entry["MessageAttributes"])


def filter_policy(where: Mapping[str, str]) -> dict[str, Any] | None:
    """What SNS compares; ``None``: everything passes."""
    if not where:
        return None
    unfiltered = {UNFILTERED: ["1"]}
    if len(where) > _HEADERS_SHOWN or not all(_can_be_shown(name, value) for name, value in where.items()):
        return unfiltered
    return {"$or": [{name: [value] for name, value in sorted(where.items())}, unfiltered]}


def _fitted(copy: Copy) -> Copy:
    over = copy.size - MOST_BYTES
    failures = list(copy.envelope.failures)
    for field in ("traceback", "message"):
        for number, failure in enumerate(failures):
            if over <= 0:
                break
            # Escaped, it may be larger than its text: what is cut is measured as it is sent.
            cut = msgspec.structs.replace(failure, **{field: ""})
            over -= len(_escaped(msgspec.json.encode(failure))) - len(_escaped(msgspec.json.encode(cut)))
            failures[number] = cut
    while over > 0 and failures:
        over -= len(_escaped(msgspec.json.encode(failures.pop(0)))) + 1
    if tuple(failures) == copy.envelope.failures:
        return copy
    return Copy(copy.text, msgspec.structs.replace(copy.envelope, failures=tuple(failures)))


def _as_text(body: bytes) -> tuple[str, bool]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if text and not _ILLEGAL.search(text):
        return text, False
    # An empty body is refused, too; base64 of nothing would be empty, so that has a line end.
    return base64.b64encode(body).decode() or "\n", True


def _legal_json(envelope: Envelope) -> str:
    return _escaped(msgspec.json.encode(envelope)).decode()


def _escaped(json: bytes) -> bytes:
    text = json.decode()
    return _ILLEGAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() if _ILLEGAL.search(text) else json


def _can_be_shown(name: str, value: str) -> bool:
    return bool(_ATTRIBUTE.fullmatch(name) and value and len(value) <= _LONGEST_SHOWN and not _ILLEGAL.search(value))


def _size(text: str, attributes: Attributes) -> int:
    return len(text.encode()) + sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"].encode()) for name, value in attributes.items()
    )


def _token(text: str) -> str:
    """What the service takes for a group or as the mark of a copy: 128 printable characters, no space."""
    return text if _TOKEN.fullmatch(text) else f"sha256:{sha256(text.encode()).hexdigest()}"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    except (OSError, OverflowError, ValueError):
        return ""


def _seconds(time: str | None) -> float:
    try:
        return datetime.fromisoformat(time).timestamp() if time else 0.0
    except ValueError:
        return 0.0
