"""Files that come with a task, as ``multipart/form-data``: kept before the message is published."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request

from postroom import codec
from postroom.gateway.problems import Problem
from postroom.gateway.site import Site
from postroom.handler import TaskHandler
from postroom.message import new_id
from postroom.store.blobs import BlobStore

MEDIA_TYPE = "multipart/form-data"
ARGUMENTS = "arguments"
"""The part that may hold all other arguments as one JSON object."""

_MAX_PARTS = 100
_CHUNK = 1 << 20


async def receive(request: Request, handler: TaskHandler, site: Site) -> tuple[str, bytes]:
    """The id for a message, and its body, which refers to files that are kept. Raises ``Problem``."""
    _check_length(request, site.max_upload)
    arguments: dict[str, Any] = {}
    async with request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS) as form:
        files: dict[str, UploadFile] = {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                _add_field(handler, arguments, name, value)
            elif value.filename or value.size:  # Browsers send a field without a file, if it was left empty.
                if name not in handler.uploads:
                    raise Problem(422, f"{handler.name} takes no file {name!r}", at={"pointer": f"#/{name}"})
                _add(arguments, name, "upload")
                files[name] = value
        # Checked before anything is kept: what is refused leaves no file behind.
        handler.check(msgspec.json.encode(arguments))
        message_id = new_id()
        for name, file in files.items():
            arguments[name] = await asyncio.to_thread(_keep, site.app.blobs, message_id, name, file)
    return message_id, msgspec.json.encode(arguments)


def _check_length(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "")
    if not (declared.isascii() and declared.isdigit()):
        raise Problem(411, "a form needs a Content-Length")
    if len(declared) > 18 or int(declared) > limit:
        raise Problem(413, f"a form may have {limit:,} bytes at most")


def _add_field(handler: TaskHandler, arguments: dict[str, Any], name: str, value: str) -> None:
    if name in handler.uploads:
        raise Problem(422, f"send {name!r} as a file, not as text", at={"pointer": f"#/{name}"})
    if name == ARGUMENTS and name not in handler.parameters:
        for member, content in _object(value).items():
            if member in handler.uploads:
                raise Problem(422, f"send {member!r} as a file, not as text", at={"pointer": f"#/{member}"})
            _add(arguments, member, content)
        return
    parameter = handler.parameters.get(name)
    _add(arguments, name, _meant(value, Any if parameter is None else parameter.annotation))


def _add(arguments: dict[str, Any], name: str, value: Any) -> None:
    if name in arguments:
        raise Problem(422, f"the form has {name!r} twice", at={"pointer": f"#/{name}"})
    arguments[name] = value


def _object(text: str) -> dict[str, Any]:
    at = {"pointer": f"#/{ARGUMENTS}"}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise Problem(422, f"the part {ARGUMENTS!r} must be a JSON object", at=at) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, f"the part {ARGUMENTS!r} is not JSON: {error}", at=at) from error


def _meant(text: str, kind: Any) -> Any:
    """A form knows only text. It stays text where the parameter's type takes it; else it is JSON, if it is that."""
    if kind is not Any:
        try:
            codec.decoder(kind).decode(msgspec.json.encode(text))
        except (msgspec.DecodeError, UnicodeError):
            pass
        else:
            return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text


def _keep(blobs: BlobStore, message_id: str, name: str, file: UploadFile) -> str:
    with blobs.writer(message_id, name, file.filename or name) as (reference, target):
        while chunk := file.file.read(_CHUNK):
            target.write(chunk)
    return reference
