"""``/openapi.json``: what this gateway takes and answers, from the types of its tasks and topics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import postroom.gateway.parameters as parameters
from postroom.broker.base import SubscriptionStats
from postroom.gateway.answers import json_response
from postroom.gateway.cloudevents import BATCHED, STRUCTURED
from postroom.gateway.forms import MEDIA_TYPE as FORM
from postroom.gateway.schemas import Schemas, form_schema
from postroom.gateway.site import Site
from postroom.gateway.views import (
    Accepted,
    Batch,
    Cancelled,
    DeadCounts,
    Health,
    JobView,
    LetterPage,
    LetterView,
    Queues,
    Redriven,
    RedriveRequest,
)
from postroom.producer.task import Task
from postroom.producer.topic import Topic

Json = dict[str, Any]

JSON = "application/json"

_PUBLISHING = (400, 413, 415, 422, 429)


class OpenAPI:
    """``GET /openapi.json``. The document is made anew when a task or topic has been added."""

    def __init__(self, site: Site, *, secured: bool) -> None:
        self._site = site
        self._secured = secured
        self._made: dict[tuple[int, int], Json] = {}

    async def show(self, request: Request) -> Response:
        app = self._site.app
        size = (len(app.tasks), len(app.topics))
        if size not in self._made:
            self._made = {size: self._document()}
        return json_response({**self._made[size], "servers": [{"url": request.scope.get("root_path") or "/"}]})

    def _document(self) -> Json:
        schemas = Schemas()
        operations = _Operations(schemas, secured=self._secured)
        paths: Json = {}
        for task in self._site.app.tasks.values():
            paths |= operations.of_task(task)
        for topic in self._site.app.topics.values():
            paths |= operations.of_topic(topic)
        paths |= operations.fixed(list(self._site.app.topics.values()))
        document: Json = {
            "openapi": "3.1.0",
            "info": {"title": "Postroom gateway", "version": "1", "description": "Background jobs and events."},
            "paths": paths,
            "components": {"schemas": schemas.components(), "parameters": parameters.COMPONENTS},
        }
        if self._secured:
            document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"bearer": []}]
        return document


class _Operations:
    """Path items, each operation with its body, answers and problems."""

    def __init__(self, schemas: Schemas, *, secured: bool) -> None:
        self._schemas = schemas
        self._refusals = (401, 503) if secured else (403, 503)

    def of_task(self, task: Task[..., Any]) -> Json:
        handler = task.handler
        handler.compile()
        arguments = self._schemas.use(handler.arguments)
        content: Json = {JSON: {"schema": arguments}}
        if handler.uploads:
            content = {FORM: {"schema": form_schema(handler, self._schemas)}}
        summary = (handler.function.__doc__ or "").strip().partition("\n")[0] or f"Enqueue {task.name}."
        path = f"/v1/tasks/{task.name}"
        single = self._operation(
            summary,
            "tasks",
            {202: ("Stored.", Accepted), 200: ("Ended within Prefer: wait.", JobView)},
            _PUBLISHING,
            parameters=parameters.PUBLISHING + parameters.names("Prefer", "IdempotencyKey"),
            content=content,
            headers=parameters.ACCEPTED,
        )
        if handler.uploads:
            return {path: {"post": single}}
        many = {JSON: {"schema": {"type": "array", "items": arguments, "minItems": 1}}}
        batch = self._operation(
            f"Enqueue {task.name} many times.",
            "tasks",
            {202: ("All stored.", Batch), 207: ("Some stored.", Batch)},
            _PUBLISHING,
            parameters=parameters.PUBLISHING + parameters.names("IdempotencyKey"),
            content=many,
        )
        return {path: {"post": single}, f"{path}/batch": {"post": batch}}

    def of_topic(self, topic: Topic[Any]) -> Json:
        event = self._schemas.use(topic.event.type)
        content = {JSON: {"schema": event}, **self._cloudevents(parameters.cloudevent(event))}
        return {f"/v1/topics/{topic.name}": {"post": self._publishing(f"Publish to {topic.name}.", content)}}

    def fixed(self, topics: Sequence[Topic[Any]]) -> Json:
        """The paths that every gateway has."""
        return {
            "/v1/events": {"post": self._events(topics)},
            **self._jobs(),
            **self._queues(),
            **self._letters(),
            **self._health(),
        }

    def _events(self, topics: Sequence[Topic[Any]]) -> Json:
        kinds = [parameters.cloudevent(self._schemas.use(topic.event.type), topic.name) for topic in topics]
        event = {"anyOf": kinds} if kinds else parameters.cloudevent({})
        summary = "Publish CloudEvents, each to the topic that its type names."
        return self._publishing(summary, self._cloudevents(event), 404)

    def _publishing(self, summary: str, content: Json, *problems: int) -> Json:
        return self._operation(
            summary,
            "topics",
            {
                202: ("Stored.", (Accepted, Batch)),
                200: ("Every subscription is done within Prefer: wait.", JobView),
                207: ("Some of a batch are stored.", Batch),
            },
            (*_PUBLISHING, *problems),
            parameters=parameters.PUBLISHING + parameters.names("Prefer", "IdempotencyKey"),
            content=content,
            headers=parameters.ACCEPTED,
        )

    def _cloudevents(self, event: Json) -> Json:
        return {
            STRUCTURED: {"schema": event},
            BATCHED: {"schema": {"type": "array", "items": event, "minItems": 1}},
        }

    def _jobs(self) -> Json:
        names = parameters.names
        get = self._operation(
            "How a job is doing.",
            "jobs",
            {200: ("Its status.", JobView), 304: ("It is as If-None-Match says.", None)},
            (404,),
            parameters=names("JobId", "PreferWait", "IfNoneMatch"),
            headers=parameters.STATUS,
        )
        cancel = self._operation(
            "Cancel a job.",
            "jobs",
            {202: ("Cancelled, or its worker is told.", Cancelled)},
            (404, 409),
            parameters=names("JobId"),
        )
        events = self._operation(
            "Every change until the end, as server-sent events with the status as data.",
            "jobs",
            {200: ("The stream.", None), 204: ("The client has seen the end.", None)},
            (404,),
            parameters=names("JobId", "LastEventId"),
        )
        events["responses"]["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        return {"/v1/jobs/{id}": {"get": get, "delete": cancel}, "/v1/jobs/{id}/events": {"get": events}}

    def _queues(self) -> Json:
        get = self._operation
        return {
            "/v1/queues": {"get": get("Queues and subscriptions in numbers.", "operators", {200: ("All.", Queues)})},
            "/v1/queues/{name}": {
                "get": get(
                    "One queue or subscription in numbers.",
                    "operators",
                    {200: ("It.", SubscriptionStats)},
                    (404,),
                    parameters=parameters.names("QueueName"),
                )
            },
        }

    def _letters(self) -> Json:
        make, names = self._operation, parameters.names
        box = "/v1/dead-letters"
        one = names("Subscription", "JobId")
        redriven = {200: ("Put back.", Redriven)}
        body = {JSON: {"schema": self._schemas.use(RedriveRequest)}}
        redrive = make(
            "Put dead letters back: those of ids, or all that are dead now.",
            "dead letters",
            redriven,
            (400, 404, 413, 415, 422),
            parameters=names("Subscription"),
            content=body,
        )
        redrive["requestBody"]["required"] = False
        return {
            box: {"get": make("How many dead letters there are.", "dead letters", {200: ("Counts.", DeadCounts)})},
            f"{box}/{{subscription}}": {
                "get": make(
                    "Dead letters, oldest first.",
                    "dead letters",
                    {200: ("A page.", LetterPage)},
                    (400, 404),
                    parameters=names("Subscription", "After", "Limit"),
                )
            },
            f"{box}/{{subscription}}/redrive": {"post": redrive},
            f"{box}/{{subscription}}/{{id}}": {
                "get": make("A dead letter.", "dead letters", {200: ("It.", LetterView)}, (404,), parameters=one),
                "delete": make("Discard it.", "dead letters", {204: ("Gone.", None)}, (404,), parameters=one),
            },
            f"{box}/{{subscription}}/{{id}}/redrive": {
                "post": make("Put it back.", "dead letters", redriven, (404,), parameters=one)
            },
        }

    def _health(self) -> Json:
        def probe(summary: str, *problems: int) -> Json:
            made = self._operation(summary, "health", {200: ("Yes.", Health)})
            refused = {str(status) for status in self._refusals} - {str(status) for status in problems}
            answers = {status: answer for status, answer in made["responses"].items() if status not in refused}
            return {"get": {**made, "responses": answers, "security": []}}

        return {"/healthz": probe("Does the process answer?"), "/readyz": probe("Does the broker answer?", 503)}

    def _view(self, view: Any) -> Json:
        if isinstance(view, tuple):
            return {"anyOf": [self._schemas.use(one) for one in view]}
        return self._schemas.use(view)

    def _operation(
        self,
        summary: str,
        tag: str,
        answers: Mapping[int, tuple[str, Any]],
        problems: tuple[int, ...] = (),
        *,
        parameters: tuple[Json, ...] = (),
        content: Json | None = None,
        headers: Json | None = None,
    ) -> Json:
        responses: Json = {}
        for status, (description, view) in answers.items():
            answer: Json = {"description": description}
            if view is not None:
                answer["content"] = {JSON: {"schema": self._view(view)}}
            if headers and status in (200, 202, 304):
                answer["headers"] = headers
            responses[str(status)] = answer
        for status in sorted({*problems, *self._refusals}):
            responses[str(status)] = self._schemas.problem(status)
        operation: Json = {"summary": summary, "tags": [tag], "responses": responses}
        if parameters:
            operation["parameters"] = list(parameters)
        if content is not None:
            operation["requestBody"] = {"required": True, "content": content}
        return operation
