"""Errors as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import (
    BrokerUnavailable,
    CodecError,
    ConfigurationError,
    DecodeError,
    IdempotencyConflict,
    JobNotFound,
    MessageTooLarge,
    PostroomError,
    QueueFull,
    SubscriptionNotFound,
    TopicNotFound,
    ValidationError,
)

logger = logging.getLogger("postroom.gateway")

RETRY_AFTER = {429: "5", 503: "5"}
"""Seconds after which trying again makes sense, by status."""

_STATUS: tuple[tuple[type[PostroomError], int, str], ...] = (
    (JobNotFound, 404, "No such job"),
    (SubscriptionNotFound, 404, "No such queue or subscription"),
    (TopicNotFound, 404, "No such topic"),
    (IdempotencyConflict, 422, "The idempotency key was used for another payload"),
    (MessageTooLarge, 413, "The message is too large"),
    (QueueFull, 429, "The queue is full"),
    (BrokerUnavailable, 503, "The broker is not available"),
    (DecodeError, 400, "The body is not JSON"),
    (ValidationError, 422, "The request does not have the declared form"),
    (CodecError, 422, "The request does not have the declared form"),
    (ConfigurationError, 422, "The request cannot be carried out"),
)
_TITLES = {
    400: "The request is malformed",
    401: "A bearer token is needed",
    403: "Not allowed",
    404: "Not found",
    405: "The method is not allowed here",
    409: "In conflict with the state of the job",
    413: "The body is too large",
    415: "The media type is not supported",
    422: "The request does not have the declared form",
}


class Problem(HTTPException):
    """Raised by a route to answer with an error."""

    def __init__(
        self, status: int, detail: str, *, pointer: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, headers)
        self.pointer = pointer


def answer(
    status: int, detail: str, *, title: str = "", pointer: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": title or _TITLES.get(status, "The request failed"),
        "status": status,
        "detail": detail,
    }
    if pointer:
        body["errors"] = [{"pointer": pointer, "detail": detail}]
    sent = dict(headers or {})
    if status in RETRY_AFTER:
        sent.setdefault("Retry-After", RETRY_AFTER[status])
    return Response(msgspec.json.encode(body), status, sent, media_type="application/problem+json")


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    pointer = error.pointer if isinstance(error, Problem) else ""
    return answer(error.status_code, error.detail, pointer=pointer, headers=error.headers)


async def on_postroom_error(request: Request, error: Exception) -> Response:
    for kind, status, title in _STATUS:
        if isinstance(error, kind):
            field = error.field if isinstance(error, ValidationError) else ""
            return answer(status, str(error), title=title, pointer=f"#/{field.replace('.', '/')}" if field else "")
    return await on_any_error(request, error)


async def on_any_error(request: Request, error: Exception) -> Response:
    """What happened goes to the log; a stranger learns nothing of it."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer(500, "the gateway's log tells more", title="The gateway failed")
