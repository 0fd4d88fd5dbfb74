"""The status of jobs: polled, waited for, streamed, cancelled."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from postroom.gateway import requests
from postroom.gateway.problems import Problem
from postroom.message import Failure
from postroom.producer.job import JobStatus

if TYPE_CHECKING:
    from postroom.app import App

_LOOK = 0.05
"""Seconds between looks for a change while a client waits."""
_KEEP_ALIVE = 15.0


class Jobs:
    """The routes under ``/v1/jobs``."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def show(self, request: Request) -> Response:
        """``GET``; with ``Prefer: wait=n`` it answers at the next change or the end."""
        status = await self._status(request)
        known = request.headers.get("if-none-match")
        patience = requests.wait(request)
        if patience is not None and not status.state.final:
            status = await self._changed(request, known or _tag(_document(status)), patience)
        tag = _tag(_document(status))
        if known == tag:
            return Response(status_code=304, headers={"ETag": tag, "Vary": "Prefer"})
        return present(request, status, {"Vary": "Prefer"})

    async def cancel(self, request: Request) -> Response:
        """``DELETE``"""
        job_id = request.path_params["id"]
        answer = await self._app.job(job_id).acancel()
        if answer == "finished":
            raise Problem(409, "the job has ended; there is nothing to cancel")
        body = msgspec.json.encode({"id": job_id, "status": answer})
        return Response(body, 202, {"Location": location(request, job_id)}, media_type="application/json")

    async def events(self, request: Request) -> Response:
        """``GET …/events``: every change as a server-sent event, until the end."""
        await self._status(request)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(request), headers=headers, media_type="text/event-stream")

    async def _stream(self, request: Request) -> AsyncIterator[bytes]:
        tag, number, quiet = "", 0, 0.0
        while True:
            status = await self._status(request)
            document = _document(status)
            if _tag(document) != tag:
                tag, number, quiet = _tag(document), number + 1, 0.0
                yield b"id: %d\nevent: %s\ndata: %s\n\n" % (
                    number,
                    status.state.encode(),
                    msgspec.json.encode(document),
                )
            if status.state.final:
                return
            await asyncio.sleep(_LOOK)
            quiet += _LOOK
            if quiet >= _KEEP_ALIVE:
                quiet = 0.0
                yield b": still there\n\n"

    async def _changed(self, request: Request, tag: str, patience: float) -> JobStatus:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while True:
            status = await self._status(request)
            if status.state.final or _tag(_document(status)) != tag or loop.time() >= deadline:
                return status
            await asyncio.sleep(_LOOK)

    async def _status(self, request: Request) -> JobStatus:
        return await self._app.job(request.path_params["id"]).astatus()


def present(request: Request, status: JobStatus, headers: Mapping[str, str]) -> Response:
    """A status as a response, with its tag, and a hint when to ask again."""
    document = _document(status)
    sent = {**headers, "ETag": _tag(document)}
    if not status.state.final:
        sent["Retry-After"] = "1"
    document["links"] = {"self": location(request, status.id), "events": location(request, status.id) + "/events"}
    return Response(msgspec.json.encode(document), 200, sent, media_type="application/json")


def location(request: Request, job_id: str) -> str:
    """The path of a job's status, wherever the gateway is mounted."""
    return f"{request.scope.get('root_path', '')}/v1/jobs/{job_id}"


def rfc3339(moment: float | None) -> str | None:
    """A unix time as RFC 3339 text in UTC."""
    return None if moment is None else dt.datetime.fromtimestamp(moment, dt.UTC).isoformat()


def problem_of(failure: Failure) -> dict[str, Any]:
    """A failed attempt as an embedded problem document."""
    return {
        "type": "about:blank",
        "title": failure.error or failure.reason,
        "detail": failure.message,
        "reason": failure.reason,
        "attempt": failure.attempt,
        "failed_at": rfc3339(failure.failed_at),
    }


def _document(status: JobStatus) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": status.id,
        "state": status.state,
        "name": status.name,
        "topic": status.topic,
        "attempt": status.attempt,
        "created_at": rfc3339(status.created_at),
        "not_before": rfc3339(status.not_before),
        "started_at": rfc3339(status.started_at),
        "finished_at": rfc3339(status.finished_at),
        "progress": status.progress,
        "result": status.result,
        "error": None if status.error is None else problem_of(status.error),
        "subscriptions": status.subscriptions,
    }
    return {name: value for name, value in document.items() if value is not None}


def _tag(document: dict[str, Any]) -> str:
    return f'"{hashlib.sha256(msgspec.json.encode(document)).hexdigest()[:20]}"'
