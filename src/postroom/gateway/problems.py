"""Errors as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    CodecError,
    ConfigurationError,
    DecodeError,
    IdempotencyConflict,
    JobNotFound,
    MessageTooLarge,
    PostroomError,
    PublishFailed,
    QueueFull,
    SubscriptionNotFound,
    TopicNotFound,
    UnsupportedOperation,
    ValidationError,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = {429: "5", 503: "5"}
"""Seconds after which trying again makes sense, by status."""

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (JobNotFound, 404, "No such job"),
    (SubscriptionNotFound, 404, "No such queue or subscription"),
    (TopicNotFound, 404, "No such topic"),
    (IdempotencyConflict, 422, "The idempotency key was used for another payload"),
    (MessageTooLarge, 413, "The message is too large"),
    (QueueFull, 429, "The queue is full"),
    (BrokerUnavailable, 503, "The broker is not available"),
    (BrokerClosed, 503, "The gateway is closed"),
    (PublishFailed, 503, "The broker did not confirm the message"),
    (UnsupportedOperation, 422, "The broker cannot do this"),
    (DecodeError, 400, "The body is not JSON"),
    (ValidationError, 422, "The request does not have the declared form"),
    (CodecError, 422, "The request does not have the declared form"),
    (ConfigurationError, 422, "The request cannot be carried out"),
    (ClientDisconnect, 400, "The client left before its body was complete"),
)
_TITLES = {
    400: "The request is malformed",
    401: "A bearer token is needed",
    403: "Not allowed",
    404: "Not found",
    405: "The method is not allowed here",
    409: "In conflict with the state of the job",
    411: "The length of the body is needed",
    413: "The body is too large",
    415: "The media type is not supported",
    422: "The request does not have the declared form",
    500: "The gateway failed",
}


class Problem(HTTPException):
    """Raised by a route to answer with an error."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str = "",
        at: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        results: Any = None,
    ) -> None:
        """``at``: what is wrong, as ``{"pointer": "#/width"}`` (into the body), ``{"parameter": "delay"}`` or
        ``{"header": "Prefer"}``. ``results``: of the items, if a whole batch was refused."""
        super().__init__(status, detail, headers)
        self.title = title or _TITLES.get(status, "The request failed")
        self.at = at
        self.results = results

    def document(self) -> dict[str, Any]:
        """The members of the problem document."""
        members = {"type": "about:blank", "title": self.title, "status": self.status_code, "detail": self.detail}
        if self.at:
            members["errors"] = [{**self.at, "detail": self.detail}]
        if self.results is not None:
            members["results"] = self.results
        return members

    def response(self) -> Response:
        headers = dict(self.headers or {})
        if self.status_code in RETRY_AFTER:
            headers.setdefault("Retry-After", RETRY_AFTER[self.status_code])
        return Response(msgspec.json.encode(self.document()), self.status_code, headers, media_type=MEDIA_TYPE)


def problem_of(error: Exception) -> Problem:
    """What to tell the client. Of an unforeseen error a stranger learns nothing."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, _detail(error), headers=error.headers)
    for kind, status, title in _STATUS:
        if isinstance(error, kind):
            return Problem(status, str(error) or title, title=title, at=_pointer(error))
    return Problem(500, "the server's log tells more")


def _detail(error: HTTPException) -> str:
    """Starlette's own words for what no route took say nothing."""
    if error.status_code == 404:
        return "there is nothing at this path; /openapi.json tells what there is"
    if error.status_code == 405:
        return f"this path takes {(error.headers or {}).get('Allow', 'other methods')}"
    return error.detail


async def on_error(request: Request, error: Exception) -> Response:
    return problem_of(error).response()


HANDLERS: dict[Any, Any] = dict.fromkeys((HTTPException, PostroomError, ClientDisconnect, Exception), on_error)
"""For Starlette, which raises what only ``Exception`` covers once more, so that the server logs it."""


def _pointer(error: Exception) -> dict[str, str] | None:
    """``user.tags[0]`` as ``#/user/tags/0`` (RFC 6901)."""
    field = error.field if isinstance(error, ValidationError) else ""
    return {"pointer": "#/" + re.sub(r"[.\[\]]+", "/", field).strip("/")} if field else None
