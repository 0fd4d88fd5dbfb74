"""``POST /v1/topics/{topic}`` and ``POST /v1/events``: ``202`` once the event is stored for every subscription."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import PostroomError
from postroom.gateway import cloudevents, requests
from postroom.gateway.answers import accept, accept_batch, split
from postroom.gateway.cloudevents import BATCHED, STRUCTURED, CloudEvent
from postroom.gateway.problems import Problem, problem_of
from postroom.gateway.site import Site, find
from postroom.message import Message, new_id
from postroom.producer.topic import Topic

_ENVELOPE = 64 * 1024
"""Bytes that the attributes of a structured CloudEvent may add to its data."""


class Topics:
    """The routes that publish."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def publish(self, request: Request) -> Response:
        """A plain event, or CloudEvents, for the topic in the path."""
        return await self._publish(request, find(request.path_params["topic"], self._site.app.topics, "topic"))

    async def publish_by_type(self, request: Request) -> Response:
        """CloudEvents, each for the topic that its type names."""
        return await self._publish(request, None)

    async def _publish(self, request: Request, topic: Topic[Any] | None) -> Response:
        kind = requests.media_type(request)
        patience = requests.wait(request)
        if kind == BATCHED:
            items = [self._judged(request, topic, item) for item in await split(self._site, request)]
            return await accept_batch(self._site, request, items)
        limit = self._site.app.max_message_size
        if kind == STRUCTURED:
            text = await requests.body(request, limit + _ENVELOPE)
            message = self._event(request, topic, cloudevents.read_structured(text))
        elif cloudevents.is_binary(request):
            body = await requests.body(request, limit)
            message = self._event(request, topic, cloudevents.read_binary(request, kind, body))
        elif topic is None:
            raise requests.wrong_type(kind, STRUCTURED, BATCHED)
        else:
            requests.require_json(request, STRUCTURED, BATCHED)
            message = self._plain(request, topic, await requests.body(request, limit))
        return await accept(self._site, request, message, patience, topic=message.topic)

    def _plain(self, request: Request, topic: Topic[Any], body: bytes) -> Message:
        topic.check(body)
        options = requests.options(request, cloudevents.plain_headers(request))
        fields = self._site.app.outlet.fields(options, None)
        return Message(id=new_id(), topic=topic.name, name=topic.name, body=body, **fields)

    def _event(self, request: Request, topic: Topic[Any] | None, event: CloudEvent) -> Message:
        target = topic or find(event.type, self._site.app.topics, "topic")
        target.check(event.body)
        if "idempotency-key" in request.headers:
            detail = "a CloudEvent is known by its source and id; leave Idempotency-Key out"
            raise Problem(400, detail, at={"header": "Idempotency-Key"})
        headers = {**requests.trace(request), **event.headers}
        options = requests.options(request, headers, key=event.key, idempotency_key=event.identity)
        fields = self._site.app.outlet.fields(options, None)
        if event.expires_at is not None:
            # What the query says is said for this request, so it goes before what the event says.
            fields.setdefault("expires_at", event.expires_at)
        return Message(id=new_id(), topic=target.name, name=target.name, body=event.body, **fields)

    def _judged(self, request: Request, topic: Topic[Any] | None, item: bytes) -> Message | Problem:
        try:
            return self._event(request, topic, cloudevents.read_structured(item))
        except (PostroomError, Problem, msgspec.MsgspecError) as error:
            return problem_of(error)
