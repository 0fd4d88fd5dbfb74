"""Messages that came in over HTTP are published, and the client is told what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import DecodeError, JobNotFound, MessageTooLarge, PostroomError
from postroom.gateway import requests
from postroom.gateway.jobs import status_response
from postroom.gateway.problems import Problem, problem_of
from postroom.gateway.site import Site, job_path
from postroom.gateway.views import Accepted, Batch, Item, moment
from postroom.message import Message

_BODIES = 32
"""A batch may have the bytes of so many messages of the largest size."""

_array = msgspec.json.Decoder(list[msgspec.Raw])
_encode = msgspec.json.Encoder().encode


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(value), status, headers, media_type="application/json")


async def accept(site: Site, request: Request, message: Message, patience: float | None, **place: str) -> Response:
    """202 once the broker has confirmed; 200 with the end if it comes within ``patience`` seconds.

    ``place``: the queue or the topic, as the answer names it.
    """
    # If this raises, the message is perhaps stored, perhaps not: its files stay.
    (answer,) = await site.app.outlet.asend([message])
    if answer != message.id:
        await asyncio.to_thread(site.app.outlet.drop_uploads, [message])
    if isinstance(answer, PostroomError):
        raise answer
    path = job_path(request, answer)
    if patience is not None:
        try:
            status = await site.wait(answer, lambda now: now.state.final, patience)
        except JobNotFound:
            pass  # It has ended, and its status was not to be kept.
        else:
            if status.state.final:
                return status_response(request, status, {"Location": path})
    headers = {"Location": path, "Retry-After": "1", "Vary": "Prefer"}
    if patience is not None or "respond-async" in requests.preferences(request):
        headers["Preference-Applied"] = "respond-async"
    view = Accepted(id=answer, status="accepted", status_url=path, accepted_at=moment(time.time()), **place)
    return json_response(view, 202, headers)


async def split(site: Site, request: Request) -> list[bytes]:
    """The items of a batch, a JSON array, as they were sent. Raises ``Problem`` or ``DecodeError``."""
    body = await requests.body(request, _BODIES * site.app.max_message_size)
    try:
        items = _array.decode(body)
    except msgspec.ValidationError as error:
        raise Problem(422, f"a batch is a JSON array: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"the body is not JSON: {error}") from error
    if not items:
        raise Problem(422, "the batch is empty; send at least one item")
    if len(items) > site.max_batch:
        raise Problem(413, f"the batch has {len(items):,} items; {site.max_batch:,} at most")
    return [bytes(item) for item in items]


async def accept_batch(site: Site, request: Request, items: Sequence[Message | Problem]) -> Response:
    """Publish what is fit for it, and answer item by item: 202 if all are stored, 207 if some are.

    Raises ``Problem`` if none is.
    """
    limit = site.app.max_message_size
    items = [_within(item, limit) for item in items]
    messages = [item for item in items if isinstance(item, Message)]
    answers = iter(await site.app.outlet.asend(messages) if messages else [])
    results = [_item(request, next(answers) if isinstance(item, Message) else item) for item in items]
    refused = [result.status for result in results if result.status != 202]
    if len(refused) == len(results):
        status = refused[0] if len(set(refused)) == 1 else 422
        raise Problem(status, "no item of the batch was accepted; see results", results=results)
    return json_response(Batch(results=results), 207 if refused else 202)


def _item(request: Request, answer: str | PostroomError | Problem) -> Item:
    if isinstance(answer, str):
        return Item(status=202, id=answer, status_url=job_path(request, answer))
    problem = problem_of(answer)
    return Item(status=problem.status_code, problem=problem.document())


def _within(item: Message | Problem, limit: int) -> Message | Problem:
    """A message, unless it is too large."""
    if isinstance(item, Problem) or len(item.body) <= limit:
        return item
    return problem_of(MessageTooLarge(f"this item has {len(item.body):,} bytes; the limit is {limit:,}"))
