"""The status of jobs: polled, waited for, streamed, cancelled."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from postroom.errors import JobNotFound
from postroom.gateway import requests
from postroom.gateway.problems import Problem
from postroom.gateway.site import Site, job_path
from postroom.gateway.views import Cancelled, job_view
from postroom.producer.job import JobStatus

KEEP_ALIVE = 15.0
"""Seconds after which a silent stream sends a comment, so that no proxy takes it for dead."""


class Jobs:
    """The routes under ``/v1/jobs``."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def show(self, request: Request) -> Response:
        """``GET``; with ``Prefer: wait=n`` it answers at the next change or the end."""
        job_id = request.path_params["id"]
        known = _tags(request)
        patience = requests.wait(request)
        status = await self._site.app.job(job_id).astatus()
        if patience is not None:
            seen = known or {_tag(_body(request, status))}
            status = await self._site.wait(
                job_id, lambda now: now.state.final or _tag(_body(request, now)) not in seen, patience
            )
        return status_response(request, status, {}, known)

    async def cancel(self, request: Request) -> Response:
        """``DELETE``"""
        job_id = request.path_params["id"]
        answer = await self._site.app.job(job_id).acancel()
        if answer == "cancelled" or answer == "requested":
            body = msgspec.json.encode(Cancelled(id=job_id, status=answer))
            return Response(body, 202, {"Location": job_path(request, job_id)}, media_type="application/json")
        raise Problem(409, "the job has ended; there is nothing to cancel")

    async def events(self, request: Request) -> Response:
        """``GET …/events``: every change as a server-sent event, until the end.

        A change's id is that of the state it led to; a browser that comes back with the last one gets only what
        is new, and 204 at the end, which tells it to stay away.
        """
        job_id, seen = request.path_params["id"], request.headers.get("last-event-id", "")
        status = await self._site.app.job(job_id).astatus()
        if status.state.final and _tag(_body(request, status)) == seen:
            return Response(status_code=204)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(headers=headers, media_type="text/event-stream")
        return StreamingResponse(self._stream(request, status, seen), headers=headers, media_type="text/event-stream")

    async def _stream(self, request: Request, status: JobStatus, seen: str) -> AsyncIterator[bytes]:
        """A change that is overtaken within a quarter of a second is left out."""

        def changed(now: JobStatus) -> bool:
            return _tag(_body(request, now)) != seen

        while True:
            if changed(status):
                body = _body(request, status)
                seen = _tag(body)
                yield b"id: %b\nevent: %b\ndata: %b\n\n" % (seen.encode(), status.state.encode(), body)
            else:
                yield b": still there\n\n"
            if status.state.final or self._site.stopping:
                return
            try:
                status = await self._site.wait(status.id, changed, KEEP_ALIVE)
            except JobNotFound:
                return  # It has ended, and its status was not to be kept.


def status_response(
    request: Request, status: JobStatus, headers: Mapping[str, str], known: frozenset[str] = frozenset()
) -> Response:
    """A status with its tag, and a hint when to ask again; 304 if the client knows it."""
    body = _body(request, status)
    tag = _tag(body)
    headers = {**headers, "ETag": f'"{tag}"', "Vary": "Prefer"}
    if not status.state.final:
        headers["Retry-After"] = "1"
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, media_type="application/json")


def _body(request: Request, status: JobStatus) -> bytes:
    return msgspec.json.encode(job_view(status, job_path(request, status.id)))


def _tag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:20]


def _tags(request: Request) -> frozenset[str]:
    """What ``If-None-Match`` lists."""
    header = ",".join(request.headers.getlist("if-none-match"))
    return frozenset(tag.strip().removeprefix("W/").strip('"') for tag in header.split(",") if tag.strip())
