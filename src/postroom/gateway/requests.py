"""What a request says: options, headers, bodies."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request

from postroom.gateway.problems import Problem
from postroom.producer.options import PublishOptions

MAX_WAIT = 30.0
"""Seconds a request may wait for a job at most."""
_NUMBERS = ("delay", "expires_in")
_TRACE = ("traceparent", "tracestate", "baggage")
_PREFERENCE = re.compile(r'\s*([A-Za-z-]+)\s*(?:=\s*"?([^",;]*)"?)?')


def options(request: Request, also: Iterable[str] = ()) -> PublishOptions:
    """From the query and the headers. Raises ``Problem`` or the option's own error."""
    fields: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in _NUMBERS:
            fields[name] = _number(name, value)
        elif name == "priority":
            fields[name] = int(_number(name, value))
        elif name == "at":
            fields[name] = _time(value)
        elif name == "key":
            fields[name] = value
        elif name not in also:
            raise Problem(400, f"unknown query parameter {name!r}", pointer=f"#/query/{name}")
    key = request.headers.get("idempotency-key")
    if key is not None:
        # A quoted string by draft-ietf-httpapi-idempotency-key-header-07; bare ones are common too.
        fields["idempotency_key"] = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
    trace = {name: request.headers[name] for name in _TRACE if name in request.headers}
    return PublishOptions(headers=trace or None, **fields)


def preferences(request: Request) -> dict[str, str]:
    """The ``Prefer`` header (RFC 7240), names in lower case."""
    header = ",".join(request.headers.getlist("prefer"))
    return {name.lower(): value for name, value in _PREFERENCE.findall(header) if name}


def wait(request: Request) -> float | None:
    """Seconds the client would wait, at most ``MAX_WAIT``; ``None`` if it did not say."""
    value = preferences(request).get("wait")
    if value is None:
        return None
    return min(MAX_WAIT, max(0.0, _number("Prefer: wait", value)))


async def body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ``Problem`` 413 as soon as it is too large, without keeping it."""
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdigit() else 0
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
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise Problem(400, f"{name}={value!r} is not a number", pointer=f"#/query/{name}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise Problem(400, f"{name}={value!r} is not a finite number", pointer=f"#/query/{name}")
    return number


def _time(value: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError:
        raise Problem(400, f"at={value!r} is not a time as 2026-11-24T10:00:00+00:00", pointer="#/query/at") from None
    if moment.tzinfo is None:
        raise Problem(
            400, f"at={value!r} has no time zone; add one, as +00:00 (%2B00:00 in a URL)", pointer="#/query/at"
        )
    return moment
