"""JSON schemas for ``/openapi.json``, from the types of tasks, topics and answers."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from postroom.gateway.forms import ARGUMENTS
from postroom.gateway.problems import MEDIA_TYPE, RETRY_AFTER
from postroom.handler import TaskHandler

Json = dict[str, Any]

_REF = "#/components/schemas/"
_PROBLEM: Json = {
    "type": "object",
    "title": "Problem",
    "description": "Problem details (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {
                    "pointer": {"type": "string", "description": "Into the body."},
                    "parameter": {"type": "string", "description": "Of the query."},
                    "header": {"type": "string", "description": "Of the request."},
                    "attribute": {"type": "string", "description": "Of a CloudEvent."},
                    "detail": {"type": "string"},
                },
            },
        },
        "results": {"type": "array", "items": {"type": "object"}, "description": "Of a batch that was refused whole."},
    },
}


class Schemas:
    """Collects the types in use. A type is referred to by its name, or given in full where it has none."""

    def __init__(self) -> None:
        self._components: dict[str, Json] = {"Problem": _PROBLEM}

    def use(self, kind: Any) -> Json:
        """The schema of a type, as it stands in a document. Its parts become components."""
        (schema,), parts = msgspec.json.schema_components(
            [kind], schema_hook=self._foreign, ref_template=f"{_REF}{{name}}"
        )
        return self._with_parts(schema, parts)

    def components(self) -> dict[str, Json]:
        return dict(sorted(self._components.items()))

    def problem(self, status: int) -> Json:
        answer: Json = {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": f"{_REF}Problem"}}},
        }
        if status in RETRY_AFTER:
            answer["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
        if status == 401:
            answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
        return answer

    def _with_parts(self, schema: Json, parts: Mapping[str, Json]) -> Json:
        """Two types of one name, of two modules or tasks, must not become one."""
        renamed = {}
        for name, part in parts.items():
            own, number = name, 2
            while own in self._components and self._components[own] != part:
                own, number = f"{name}{number}", number + 1
            renamed[name] = own
        for name, part in parts.items():
            self._components[renamed[name]] = _renamed(part, renamed)
        made: Json = _renamed(schema, renamed)
        return made

    def _foreign(self, kind: type) -> Json:
        """pydantic's own schema; a path is text."""
        if not hasattr(kind, "model_json_schema"):
            return {"type": "string"}
        schema: Json = kind.model_json_schema(ref_template=f"{_REF}{{model}}")
        return self._with_parts(schema, schema.pop("$defs", {}))


def form_schema(handler: TaskHandler, schemas: Schemas) -> Json:
    """A task with files as a form: files in parts of their own, the others as text or JSON."""
    fields = msgspec.structs.fields(handler.arguments)
    properties: Json = {}
    for field in fields:
        if field.name in handler.uploads:
            properties[field.name] = {
                "type": "string",
                "format": "binary",
                "contentMediaType": "application/octet-stream",
            }
        else:
            properties[field.name] = schemas.use(field.type)
    required = [field.name for field in fields if field.required and field.name in handler.uploads]
    described = f"Files in parts of their own; a part {ARGUMENTS!r} may hold the other arguments as one JSON object."
    return {
        "type": "object",
        "description": described,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: _REF + names.get(value.removeprefix(_REF), value.removeprefix(_REF))
            if key == "$ref" and isinstance(value, str)
            else _renamed(value, names)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    return node
