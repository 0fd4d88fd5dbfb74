"""Enqueue and publish: ``202`` only after the broker has confirmed."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from postroom.errors import ConfigurationError, PostroomError
from postroom.gateway import jobs, requests
from postroom.gateway.problems import Problem
from postroom.message import Message, new_id
from postroom.producer.options import PublishOptions
from postroom.producer.task import Task
from postroom.topology import known

if TYPE_CHECKING:
    from postroom.app import App

_FORM = "multipart/form-data"
_MAX_FIELDS = 100
_CHUNK = 1 << 20


class Produce:
    """The routes that take work."""

    def __init__(self, app: App, max_upload: int) -> None:
        self._app = app
        self._max_upload = max_upload

    async def enqueue(self, request: Request) -> Response:
        """``POST /v1/tasks/{task}``"""
        task = self._task(request.path_params["task"])
        options, patience = requests.options(request), requests.wait(request)
        task.handler.compile()
        if requests.media_type(request) == _FORM:
            message = await self._from_form(request, task, options)
        else:
            message = await self._from_json(request, task, options)
        return await self._accept(request, message, patience, queue=task.queue)

    async def publish(self, request: Request) -> Response:
        """``POST /v1/topics/{topic}``"""
        name = request.path_params["topic"]
        try:
            topic = self._app.topics[known(name, self._app.topics, "topic")]
        except ConfigurationError as error:
            raise Problem(404, str(error)) from error
        options, patience = requests.options(request), requests.wait(request)
        _require_json(request)
        body = await requests.body(request, self._app.max_message_size)
        topic.check(body)
        message = Message(id=new_id(), topic=name, name=name, body=body, **self._app.outlet.fields(options, None))
        return await self._accept(request, message, patience, topic=name)

    def _task(self, name: str) -> Task[..., Any]:
        try:
            return self._app.tasks[known(name, self._app.tasks, "task")]
        except ConfigurationError as error:
            raise Problem(404, str(error)) from error

    async def _from_json(self, request: Request, task: Task[..., Any], options: PublishOptions) -> Message:
        _require_json(request)
        body = await requests.body(request, self._app.max_message_size) or b"{}"
        task.handler.check(body)
        named = task.handler.uploads and task.handler.uploads & msgspec.json.decode(body).keys()
        if named:
            # A client must never name a file of the server's.
            raise Problem(422, f"send {sorted(named)[0]!r} as a file part of {_FORM}", pointer=f"#/{sorted(named)[0]}")
        return self._message(task, options, new_id(), body)

    async def _from_form(self, request: Request, task: Task[..., Any], options: PublishOptions) -> Message:
        declared = request.headers.get("content-length", "")
        if not declared.isdigit():
            raise Problem(411, "a form needs a Content-Length")
        if int(declared) > self._max_upload:
            raise Problem(413, f"a form may have {self._max_upload:,} bytes at most")
        message_id = new_id()
        arguments: dict[str, Any] = {}
        async with request.form(max_files=_MAX_FIELDS, max_fields=_MAX_FIELDS) as form:
            files = {name: value for name, value in form.multi_items() if isinstance(value, UploadFile)}
            for name, value in form.multi_items():
                if isinstance(value, str):
                    self._add_field(task, arguments, name, value)
            for name in files:
                if name not in task.handler.uploads:
                    raise Problem(422, f"{task.name} takes no file {name!r}", pointer=f"#/{name}")
                arguments[name] = "upload"
            # Checked before anything is kept: what is refused leaves no file behind.
            task.handler.check(msgspec.json.encode(arguments))
            for name, file in files.items():
                arguments[name] = await asyncio.to_thread(self._keep, message_id, name, file)
        return self._message(task, options, message_id, msgspec.json.encode(arguments))

    def _add_field(self, task: Task[..., Any], arguments: dict[str, Any], name: str, value: str) -> None:
        if name in task.handler.uploads:
            raise Problem(422, f"send {name!r} as a file, not as text", pointer=f"#/{name}")
        if name == "arguments" and name not in task.handler.arguments.__struct_fields__:
            arguments.update(_object(value))
            return
        arguments[name] = _loose(task, name, value)

    def _keep(self, message_id: str, name: str, file: UploadFile) -> str:
        with self._app.blobs.writer(message_id, name, file.filename or name) as (reference, target):
            while chunk := file.file.read(_CHUNK):
                target.write(chunk)
        return reference

    def _message(self, task: Task[..., Any], options: PublishOptions, message_id: str, body: bytes) -> Message:
        fields = self._app.outlet.fields(options, task.handler.options)
        return Message(id=message_id, topic=task.queue, name=task.name, body=body, **fields)

    async def _accept(self, request: Request, message: Message, patience: float | None, **place: str) -> Response:
        # If this raises, the message is perhaps stored, perhaps not: its files stay.
        (answer,) = await self._app.outlet.asend([message])
        if isinstance(answer, PostroomError):
            await asyncio.to_thread(self._app.outlet.drop_uploads, [message])
            raise answer
        if answer != message.id:
            await asyncio.to_thread(self._app.outlet.drop_uploads, [message])
        location = jobs.location(request, answer)
        if patience is not None:
            status = await self._app.job(answer).aoutcome(patience)
            if status.state.final:
                return jobs.present(request, status, {"Location": location, "Vary": "Prefer"})
        headers = {"Location": location, "Retry-After": "1", "Vary": "Prefer"}
        if patience is not None or "respond-async" in requests.preferences(request):
            headers["Preference-Applied"] = "respond-async"
        body = {
            "id": answer,
            "status": "accepted",
            "status_url": location,
            **place,
            "accepted_at": jobs.rfc3339(time.time()),
        }
        return Response(msgspec.json.encode(body), 202, headers, media_type="application/json")


def _require_json(request: Request) -> None:
    kind = requests.media_type(request)
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise Problem(415, f"send application/json, not {kind}")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Problem(400, f"the part 'arguments' is not JSON: {error}", pointer="#/arguments") from error
    if not isinstance(value, dict):
        raise Problem(422, "the part 'arguments' must be a JSON object", pointer="#/arguments")
    return value


def _loose(task: Task[..., Any], name: str, value: str) -> Any:
    """A form knows only text: the parameter's type says whether it is meant as such."""
    parameter = task.handler.parameters.get(name)
    if parameter is not None and parameter.annotation in (str, "str"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
