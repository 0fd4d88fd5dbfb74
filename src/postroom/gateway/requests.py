"""What a request says: options, headers, bodies."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Container, Mapping
from typing import Any

from starlette.requests import Request

from postroom.errors import ValidationError
from postroom.gateway.problems import Problem
from postroom.message import MAX_PRIORITY
from postroom.producer.options import MAX_KEY_LENGTH, PublishOptions

MAX_WAIT = 30.0
"""Seconds a request may wait for a job at most."""
TRACE = ("traceparent", "tracestate", "baggage")
"""Headers that tie a message to the request that caused it (W3C Trace Context and Baggage)."""
IDEMPOTENCY_KEY = re.compile(rf'"[ !#-\[\]-~]{{1,{MAX_KEY_LENGTH}}}"|[!#-\[\]-~]{{1,{MAX_KEY_LENGTH}}}')
"""A quoted string by draft-ietf-httpapi-idempotency-key-header-07; bare ones are common too."""

_OPTIONS = ("delay", "at", "priority", "key", "expires_in")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_PREFERENCE = re.compile(r'\s*([A-Za-z-]+)\s*(?:=\s*"?([^",;]*)"?)?')


def options(
    request: Request, headers: Mapping[str, str], *, key: str | None = None, idempotency_key: str | None = None
) -> PublishOptions:
    """From the query and ``Idempotency-Key``; ``key`` and ``idempotency_key`` where those say nothing.

    ``headers``: the message's. Raises ``Problem``.
    """
    given = query(request, _OPTIONS)
    fields: dict[str, Any] = {name: _READ[name](name, value) for name, value in given.items()}
    if "delay" in fields and "at" in fields:
        raise _bad("at", "give delay or at, not both", 400)
    fields.setdefault("key", key)
    own = _idempotency_key(request)
    try:
        return PublishOptions(
            headers=headers or None, idempotency_key=idempotency_key if own is None else own, **fields
        )
    except ValidationError as error:
        place = {"parameter": error.field} if error.field in _OPTIONS else {"header": error.field.replace("_", "-")}
        raise Problem(422, str(error), at=place) from error


def query(request: Request, names: Container[str]) -> dict[str, str]:
    """The query's parameters, each once. Raises ``Problem`` for one that is not among ``names``."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise _bad(name, "unknown query parameter", 400)
        if name in given:
            raise _bad(name, "given twice", 400)
        given[name] = value
    return given


def trace(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in TRACE if name in request.headers}


def preferences(request: Request) -> dict[str, str]:
    """The ``Prefer`` header (RFC 7240), names in lower case."""
    header = ",".join(request.headers.getlist("prefer"))
    return {name.lower(): value for name, value in _PREFERENCE.findall(header) if name}


def wait(request: Request) -> float | None:
    """Seconds the client would wait, at most ``MAX_WAIT``; ``None`` if it did not say. Raises ``Problem``."""
    value = preferences(request).get("wait")
    if value is None:
        return None
    if not _NUMBER.fullmatch(value):
        raise Problem(400, f"Prefer: wait={value} is not a number of seconds", at={"header": "Prefer"})
    return min(MAX_WAIT, max(0.0, float(value)))


async def body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ``Problem`` 413 as soon as it is too large, without keeping it."""
    declared = request.headers.get("content-length", "0")
    size = int(declared) if len(declared) < 20 and declared.isdecimal() else 0
    parts = []
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            parts.append(part)
            if size > limit:
                break
    if size > limit:
        raise Problem(413, f"the body may have {limit:,} bytes at most")
    return b"".join(parts)


def media_type(request: Request) -> str:
    """In lower case, without parameters; empty if not said."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    """Whether a media type is JSON; one that is not said is taken for it."""
    return kind in ("", "application/json") or (kind.startswith("application/") and kind.endswith("+json"))


def require_json(request: Request, *others: str) -> None:
    """Raises ``Problem`` 415. ``others``: what else could have been sent, for the message."""
    kind = media_type(request)
    if not is_json(kind):
        raise wrong_type(kind, "application/json", *others)


def wrong_type(kind: str, *accepted: str) -> Problem:
    known = ", ".join(accepted)
    return Problem(415, f"send {known}, not {kind or 'a body without Content-Type'}", headers={"Accept-Post": known})


def time(text: str) -> dt.datetime | None:
    """An RFC 3339 time; ``None`` if it is none, or has no time zone."""
    try:
        moment = dt.datetime.fromisoformat(text.upper())
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(key):
        allowed = f'1 to {MAX_KEY_LENGTH} visible ASCII characters, none of them " or \\'
        detail = f"Idempotency-Key: {allowed}; in double quotes, or without"
        raise Problem(400, detail, at={"header": "Idempotency-Key"})
    return key.strip('"')


def _seconds(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise _bad(name, f"{text!r} is not a number of seconds", 400)
    value = float(text)
    if value < 0 or value == float("inf"):
        raise _bad(name, f"{text!r}: a finite number of seconds, at least 0")
    return value


def _priority(name: str, text: str) -> int:
    if not re.fullmatch(r"-?\d+", text, re.ASCII):
        raise _bad(name, f"{text!r} is not a number", 400)
    # Digits without end are no number to compute with.
    if len(text) > 4 or not 0 <= int(text) <= MAX_PRIORITY:
        raise _bad(name, f"{text[:10]!r}: 0 to {MAX_PRIORITY}")
    return int(text)


def _time(name: str, text: str) -> dt.datetime:
    moment = time(text)
    if moment is None:
        raise _bad(
            name, f"{text!r} is not a time with its time zone, as 2026-11-24T10:00:00Z (in a URL + is written %2B)", 400
        )
    return moment


def _text(name: str, text: str) -> str:
    return text


def _bad(name: str, detail: str, status: int = 422) -> Problem:
    return Problem(status, f"query parameter {name!r}: {detail}", at={"parameter": name})


_READ: dict[str, Any] = {"delay": _seconds, "at": _time, "priority": _priority, "key": _text, "expires_in": _seconds}
