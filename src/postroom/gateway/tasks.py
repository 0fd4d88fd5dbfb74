"""``POST /v1/tasks/{task}``, one call or a batch: ``202`` only after the broker has confirmed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import PostroomError
from postroom.gateway import forms, requests
from postroom.gateway.answers import accept, accept_batch, split
from postroom.gateway.cloudevents import plain_headers
from postroom.gateway.problems import Problem, problem_of
from postroom.gateway.site import Site, find
from postroom.message import Message, new_id
from postroom.producer.options import PublishOptions
from postroom.producer.task import Task


class Tasks:
    """The routes that enqueue."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def enqueue(self, request: Request) -> Response:
        """``POST /v1/tasks/{task}``: the arguments as a JSON object, or a form where the task takes files."""
        task = self._task(request)
        options = requests.options(request, plain_headers(request))
        patience = requests.wait(request)
        if requests.media_type(request) == forms.MEDIA_TYPE:
            message_id, body = await forms.receive(request, task.handler, self._site)
            message = self._message(task, options, message_id, body)
        else:
            requests.require_json(request, *([forms.MEDIA_TYPE] if task.handler.uploads else []))
            body = await requests.body(request, self._site.app.max_message_size)
            message = self._checked(task, options, body or b"{}")
        return await accept(self._site, request, message, patience, queue=task.queue)

    async def enqueue_many(self, request: Request) -> Response:
        """``POST /v1/tasks/{task}/batch``: a JSON array of arguments."""
        task = self._task(request)
        options = requests.options(request, plain_headers(request))
        requests.require_json(request)
        items: list[Message | Problem] = []
        for position, body in enumerate(await split(self._site, request)):
            try:
                items.append(self._checked(task, _of_item(options, position), body))
            except (PostroomError, Problem) as error:
                items.append(problem_of(error))
        return await accept_batch(self._site, request, items)

    def _task(self, request: Request) -> Task[..., Any]:
        task = find(request.path_params["task"], self._site.app.tasks, "task")
        task.handler.compile()
        return task

    def _checked(self, task: Task[..., Any], options: PublishOptions, body: bytes) -> Message:
        task.handler.check(body)
        named = task.handler.uploads and task.handler.uploads & msgspec.json.decode(body).keys()
        if named:
            # A client must never name a file of the server's.
            name = min(named)
            raise Problem(422, f"send {name!r} as a file part of {forms.MEDIA_TYPE}", at={"pointer": f"#/{name}"})
        return self._message(task, options, new_id(), body)

    def _message(self, task: Task[..., Any], options: PublishOptions, message_id: str, body: bytes) -> Message:
        fields = self._site.app.outlet.fields(options, task.handler.options)
        return Message(id=message_id, topic=task.queue, name=task.name, body=body, **fields)


def _of_item(options: PublishOptions, position: int) -> PublishOptions:
    """A batch that is sent again finds its jobs: its key counts for each item by the item's place."""
    if options.idempotency_key is None:
        return options
    return replace(options, idempotency_key=f"{options.idempotency_key}#{position}")
