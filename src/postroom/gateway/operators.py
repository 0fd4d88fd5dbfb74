"""Queues, dead letters and health."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from postroom.dead_letters import DeadLetters
from postroom.errors import DecodeError, JobNotFound, PostroomError
from postroom.gateway import requests
from postroom.gateway.answers import json_response
from postroom.gateway.problems import Problem
from postroom.gateway.site import Site
from postroom.gateway.views import (
    DeadCount,
    DeadCounts,
    Health,
    LetterPage,
    Queues,
    Redriven,
    RedriveRequest,
    letter_view,
)

MAX_PAGE = 1000
_MAX_BODY = 1 << 20


class Operators:
    """The routes for those who run the system."""

    def __init__(self, site: Site) -> None:
        self._app = site.app

    async def healthy(self, request: Request) -> Response:
        """``GET /healthz``: the process answers."""
        return json_response(Health(status="ok"))

    async def ready(self, request: Request) -> Response:
        """``GET /readyz``: the broker answers too."""
        try:
            await self._app.astats()
        except PostroomError as error:
            # Everyone may ask, so nothing is told but that it is so.
            raise Problem(503, "the broker does not answer", title="The broker is not available") from error
        return json_response(Health(status="ok"))

    async def queues(self, request: Request) -> Response:
        """``GET /v1/queues``"""
        return json_response(Queues(queues=list(await self._app.astats())))

    async def queue(self, request: Request) -> Response:
        """``GET /v1/queues/{name}``"""
        name = request.path_params["name"]
        for stats in await self._app.astats():
            if stats.name == name:
                return json_response(stats)
        raise Problem(404, f"no queue or subscription {name!r}")

    async def dead_counts(self, request: Request) -> Response:
        """``GET /v1/dead-letters``"""
        counts = [DeadCount(subscription=item.name, dead=item.dead) for item in await self._app.astats()]
        return json_response(DeadCounts(subscriptions=counts))

    async def dead_letters(self, request: Request) -> Response:
        """``GET /v1/dead-letters/{subscription}?after=&limit=``"""
        page = requests.query(request, ("after", "limit"))
        limit = page.get("limit", "100")
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= MAX_PAGE):
            raise Problem(400, f"limit={limit[:10]!r}: a number from 1 to {MAX_PAGE}", at={"parameter": "limit"})
        letters = await self._box(request).alist(after=page.get("after"), limit=int(limit))
        return json_response(LetterPage(dead_letters=[letter_view(letter) for letter in letters]))

    async def dead_letter(self, request: Request) -> Response:
        """``GET /v1/dead-letters/{subscription}/{id}``"""
        return json_response(letter_view(await self._box(request).aget(request.path_params["id"])))

    async def redrive_one(self, request: Request) -> Response:
        """``POST /v1/dead-letters/{subscription}/{id}/redrive``"""
        job_id = request.path_params["id"]
        if not await self._box(request).aredrive([job_id]):
            raise _gone(job_id)
        return json_response(Redriven(redriven=1))

    async def redrive(self, request: Request) -> Response:
        """``POST /v1/dead-letters/{subscription}/redrive`` with ``{"ids": […]}``, or ``{}`` for all."""
        requests.require_json(request)
        body = await requests.body(request, _MAX_BODY)
        try:
            wanted = msgspec.json.decode(body or b"{}", type=RedriveRequest)
        except msgspec.ValidationError as error:
            raise Problem(422, str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"the body is not JSON: {error}") from error
        return json_response(Redriven(redriven=await self._box(request).aredrive(wanted.ids)))

    async def discard(self, request: Request) -> Response:
        """``DELETE /v1/dead-letters/{subscription}/{id}``"""
        job_id = request.path_params["id"]
        if not await self._box(request).adiscard([job_id]):
            raise _gone(job_id)
        return Response(status_code=204)

    def _box(self, request: Request) -> DeadLetters:
        return self._app.dead_letters(request.path_params["subscription"])


def _gone(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no dead letter {job_id}; it may have been redriven or discarded")
