"""CloudEvents 1.0 over HTTP: binary, structured and batched, read into what becomes a message.

(source, id) is the identity by which duplicates are known. The data stays the bytes that were sent. Extensions become
the message's headers under their own names, so that ``where`` chooses alike whether an event came over HTTP or from
Python; the attributes that CloudEvents itself defines become headers ``ce-…``.
Source: CloudEvents core 1.0.2, HTTP protocol binding 1.0.2, JSON format 1.0.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.requests import Request

from postroom.errors import DecodeError
from postroom.gateway.problems import Problem
from postroom.gateway.requests import is_json, time, trace, wrong_type
from postroom.producer.options import MAX_KEY_LENGTH

STRUCTURED = "application/cloudevents+json"
BATCHED = "application/cloudevents-batch+json"
MAX_TEXT = 1024
"""Characters of an attribute."""

_PREFIX = "ce-"
_REQUIRED = ("id", "source", "type")
_CONTEXT = frozenset({"specversion", *_REQUIRED, "time", "subject", "dataschema", "datacontenttype"})
_OPTIONS = frozenset({"partitionkey", "expirytime"})
"""Extensions that become fields of the message, not headers."""
_NAME = re.compile(r"[a-z0-9]+")
_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]*")

_event = msgspec.json.Decoder(dict[str, msgspec.Raw])
_plain = msgspec.json.Decoder(str | int | bool)


@dataclass(frozen=True)
class CloudEvent:
    """One event, as it is published."""

    type: str
    body: bytes
    headers: Mapping[str, str]
    key: str | None
    identity: str
    """The idempotency key."""
    expires_at: float | None
    """Unix time."""


def plain_headers(request: Request) -> dict[str, str]:
    """What a request that is no CloudEvent gives its message: its trace, and ``ce-tier`` as the header ``tier``.

    Raises ``Problem`` for attributes that mean something in a CloudEvent only.
    """
    extensions = _from_headers(request)
    for name in extensions:
        if name in _CONTEXT | _OPTIONS:
            raise _bad(name, f"only for a CloudEvent, which the header {_PREFIX}specversion: 1.0 makes of an event")
    _check_texts(extensions)
    return {**trace(request), **extensions}


def is_binary(request: Request) -> bool:
    return f"{_PREFIX}specversion" in request.headers


def read_binary(request: Request, kind: str, body: bytes) -> CloudEvent:
    """Attributes in headers, data in the body. Raises ``Problem``."""
    attributes = _from_headers(request)
    if "datacontenttype" in attributes:
        raise _bad("datacontenttype", "in binary mode the header Content-Type says this")
    if body and not is_json(kind):
        raise wrong_type(kind, "application/json")
    return _made(attributes, body or b"null")


def read_structured(text: bytes) -> CloudEvent:
    """One JSON object with attributes and data. Raises ``Problem`` and ``DecodeError``."""
    try:
        members = _event.decode(text)
    except msgspec.ValidationError as error:
        raise Problem(422, f"a CloudEvent is a JSON object: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"the body is not JSON: {error}") from error
    data = members.pop("data", None)
    if "data_base64" in members:
        raise Problem(422, "data_base64: events are JSON here; send data", at={"pointer": "#/data_base64"})
    attributes = {name: _text(name, bytes(value)) for name, value in members.items() if bytes(value) != b"null"}
    kind = attributes.pop("datacontenttype", "application/json")
    if not is_json(kind.partition(";")[0].strip().lower()):
        raise _bad("datacontenttype", f"{kind[:100]!r} is not JSON")
    return _made(attributes, b"null" if data is None else bytes(data))


def _made(attributes: dict[str, str], body: bytes) -> CloudEvent:
    _check(attributes)
    if "time" in attributes:
        _time(attributes, "time")
    headers = {
        f"{_PREFIX}{name}" if name in _CONTEXT else name: value
        for name, value in attributes.items()
        if name != "specversion" and name not in _OPTIONS
    }
    return CloudEvent(
        type=attributes["type"],
        body=body,
        headers=headers,
        key=attributes.get("partitionkey"),
        identity=_identity(attributes["source"], attributes["id"]),
        expires_at=_time(attributes, "expirytime") if "expirytime" in attributes else None,
    )


def _from_headers(request: Request) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for header, value in request.headers.items():
        if header.startswith(_PREFIX):
            name = header.removeprefix(_PREFIX)
            if name in attributes:
                raise _bad(name, "given twice")
            attributes[name] = _percent_decoded(name, value)
    return attributes


def _identity(source: str, event_id: str) -> str:
    """A source is a URI reference, so it has no space: two events never share a key by accident."""
    plain = f"{source} {event_id}"
    return plain if len(plain) <= MAX_KEY_LENGTH and plain.isprintable() else sha256(plain.encode()).hexdigest()


def _check(attributes: Mapping[str, str]) -> None:
    if attributes.get("specversion") != "1.0":
        raise _bad("specversion", "1.0 is needed")
    for name in _REQUIRED:
        if not attributes.get(name):
            raise _bad(name, "a text is needed")
    _check_texts(attributes)
    if " " in attributes["source"]:
        raise _bad("source", "a URI has no spaces")
    if not attributes.get("partitionkey", "-"):
        raise _bad("partitionkey", "a text is needed")


def _check_texts(attributes: Mapping[str, str]) -> None:
    for name, value in attributes.items():
        if not _NAME.fullmatch(name):
            raise _bad(name, "names of attributes are lower-case letters and digits")
        if len(value) > MAX_TEXT or not _TEXT.fullmatch(value):
            raise _bad(name, f"at most {MAX_TEXT} characters, none of them a control character")


def _text(name: str, value: bytes) -> str:
    """An attribute's canonical text."""
    try:
        plain = _plain.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(name, "a text, an integer or a boolean is needed") from error
    return plain if isinstance(plain, str) else msgspec.json.encode(plain).decode()


def _percent_decoded(name: str, value: str) -> str:
    try:
        return unquote_to_bytes(value.strip('"')).decode()
    except UnicodeDecodeError as error:
        raise _bad(name, "not UTF-8 once percent-decoded") from error


def _time(attributes: Mapping[str, str], name: str) -> float:
    moment = time(attributes[name])
    if moment is None:
        raise _bad(name, "a time as in RFC 3339 is needed, such as 2030-01-31T08:00:00Z")
    return moment.timestamp()


def _bad(name: str, detail: str) -> Problem:
    name = name[:100]
    return Problem(400, f"CloudEvents attribute {name!r}: {detail}", at={"attribute": name})
