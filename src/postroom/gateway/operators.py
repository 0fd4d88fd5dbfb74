"""Queues, dead letters and health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import JobNotFound, PostroomError
from postroom.gateway import requests
from postroom.gateway.jobs import problem_of, rfc3339
from postroom.gateway.problems import Problem, answer
from postroom.message import DeadLetter

if TYPE_CHECKING:
    from postroom.app import App

MAX_PAGE = 1000
_MAX_BODY = 1 << 20


class Operators:
    """The routes for those who run the system."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def healthy(self, request: Request) -> Response:
        """``GET /healthz``: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /readyz``: the broker answers too."""
        try:
            await self._app.astats()
        except PostroomError as error:
            return answer(503, str(error), title="The broker is not available")
        return _json({"status": "ok"})

    async def queues(self, request: Request) -> Response:
        """``GET /v1/queues``"""
        return _json({"queues": await self._app.astats()})

    async def queue(self, request: Request) -> Response:
        """``GET /v1/queues/{name}``"""
        name = request.path_params["name"]
        for stats in await self._app.astats():
            if stats.name == name:
                return _json(stats)
        raise Problem(404, f"no queue or subscription {name!r}")

    async def dead_counts(self, request: Request) -> Response:
        """``GET /v1/dead-letters``"""
        counts = [{"subscription": item.name, "dead": item.dead} for item in await self._app.astats()]
        return _json({"subscriptions": counts})

    async def dead_letters(self, request: Request) -> Response:
        """``GET /v1/dead-letters/{subscription}?after=&limit=``"""
        limit = request.query_params.get("limit", "100")
        if not limit.isdigit() or not 1 <= int(limit) <= MAX_PAGE:
            raise Problem(400, f"limit={limit!r}: a number from 1 to {MAX_PAGE}", pointer="#/query/limit")
        box = self._app.dead_letters(request.path_params["subscription"])
        letters = await box.alist(after=request.query_params.get("after"), limit=int(limit))
        return _json({"dead_letters": [_document(letter) for letter in letters]})

    async def dead_letter(self, request: Request) -> Response:
        """``GET /v1/dead-letters/{subscription}/{id}``"""
        box = self._app.dead_letters(request.path_params["subscription"])
        return _json(_document(await box.aget(request.path_params["id"])))

    async def redrive_one(self, request: Request) -> Response:
        """``POST /v1/dead-letters/{subscription}/{id}/redrive``"""
        job_id = request.path_params["id"]
        if not await self._app.dead_letters(request.path_params["subscription"]).aredrive([job_id]):
            raise JobNotFound(f"there is no dead letter {job_id}; it may have been redriven or discarded")
        return _json({"redriven": 1})

    async def redrive(self, request: Request) -> Response:
        """``POST /v1/dead-letters/{subscription}/redrive`` with ``{"ids": […]}``, or ``{}`` for all."""
        body = await requests.body(request, _MAX_BODY)
        try:
            wanted = msgspec.json.decode(body or b"{}", type=_Redrive)
        except msgspec.ValidationError as error:
            raise Problem(422, str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Problem(400, f"the body is not JSON: {error}") from error
        box = self._app.dead_letters(request.path_params["subscription"])
        return _json({"redriven": await box.aredrive(wanted.ids)})

    async def discard(self, request: Request) -> Response:
        """``DELETE /v1/dead-letters/{subscription}/{id}``"""
        job_id = request.path_params["id"]
        if not await self._app.dead_letters(request.path_params["subscription"]).adiscard([job_id]):
            raise JobNotFound(f"there is no dead letter {job_id}; it may have been redriven or discarded")
        return Response(status_code=204)


class _Redrive(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[str] | None = None


def _document(letter: DeadLetter) -> dict[str, Any]:
    message = letter.message
    try:
        body = msgspec.json.decode(message.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = message.body.decode(errors="backslashreplace")
    return {
        "id": message.id,
        "subscription": letter.subscription,
        "topic": message.topic,
        "name": message.name,
        "body": body,
        "headers": dict(message.headers),
        "key": message.key,
        "created_at": rfc3339(message.created_at),
        "dead_at": rfc3339(letter.dead_at),
        "redriven": letter.redriven,
        "failures": [
            {
                **problem_of(failure),
                "error": failure.error or failure.reason,
                "message": failure.message,
                "traceback": failure.traceback,
                "worker": failure.worker,
                "started_at": rfc3339(failure.started_at),
            }
            for failure in letter.failures
        ],
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
