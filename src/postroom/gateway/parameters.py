"""The parameters and headers that ``/openapi.json`` describes."""

from __future__ import annotations

from typing import Any

from postroom.gateway.cloudevents import MAX_TEXT
from postroom.gateway.requests import IDEMPOTENCY_KEY
from postroom.producer.options import MAX_KEY_LENGTH

Json = dict[str, Any]

_TEXT: Json = {
    "type": "string",
    "pattern": f"^[ -~]{{1,{MAX_KEY_LENGTH}}}$",
    "minLength": 1,
    "maxLength": MAX_KEY_LENGTH,
}
_ID: Json = {"type": "string", "minLength": 1}


def _parameter(place: str, name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


COMPONENTS: dict[str, Json] = {
    "Delay": _parameter("query", "delay", {"type": "number", "minimum": 0}, "Seconds from now before it may start."),
    "At": _parameter(
        "query", "at", {"type": "string", "format": "date-time"}, "Not before this time; instead of delay."
    ),
    "Priority": _parameter(
        "query",
        "priority",
        {"type": "integer", "minimum": 0, "maximum": 9},
        "Higher runs first; by default the task's.",
    ),
    "Key": _parameter("query", "key", _TEXT, "Messages of one key run in order, where the queue is ordered."),
    "ExpiresIn": _parameter(
        "query",
        "expires_in",
        {"type": "number", "exclusiveMinimum": 0},
        "Seconds from now after which it is not started any more.",
    ),
    "IdempotencyKey": _parameter(
        "header",
        "Idempotency-Key",
        {"type": "string", "pattern": f"^({IDEMPOTENCY_KEY.pattern})$"},
        "Within 24 h requests with one key and one body are one job. Scope: the queue, or the topic. In a "
        "batch it counts for each item by its place. Not for CloudEvents, which are known by source and id.",
    ),
    "Prefer": _parameter(
        "header",
        "Prefer",
        {"type": "string", "examples": ["respond-async, wait=5"]},
        "RFC 7240. wait=n: answer 200 if it ends within n seconds (30 at most), else 202.",
    ),
    "PreferWait": _parameter(
        "header",
        "Prefer",
        {"type": "string", "examples": ["wait=10"]},
        "wait=n: answer at a change, after n s at most.",
    ),
    "IfNoneMatch": _parameter("header", "If-None-Match", {"type": "string"}, "The ETag of what the client knows."),
    "LastEventId": _parameter("header", "Last-Event-ID", {"type": "string"}, "Sent by browsers when they reconnect."),
    "JobId": _parameter("path", "id", _ID, "The id of the 202."),
    "QueueName": _parameter("path", "name", _ID, "A queue or subscription."),
    "Subscription": _parameter("path", "subscription", _ID, "A queue or subscription."),
    "After": _parameter("query", "after", _TEXT, "The id of the last one of the page before."),
    "Limit": _parameter(
        "query", "limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "How many; 100 by default."
    ),
}


def names(*components: str) -> tuple[Json, ...]:
    return tuple({"$ref": f"#/components/parameters/{name}"} for name in components)


PUBLISHING = names("Delay", "At", "Priority", "Key", "ExpiresIn")

_STRING: Json = {"schema": {"type": "string"}}
ACCEPTED: Json = {
    "Location": {**_STRING, "description": "The job's status (202)."},
    "Retry-After": {**_STRING, "description": "Seconds until it is worth asking (202)."},
    "Preference-Applied": {**_STRING, "description": "What of Prefer was honoured."},
}
STATUS: Json = {
    "ETag": {**_STRING, "description": "Changes with the status."},
    "Retry-After": {**_STRING, "description": "Seconds until it is worth asking again, while pending."},
}


def cloudevent(data: Json, kind: str | None = None) -> Json:
    """A structured CloudEvent whose data is of this schema. ``kind``: the type it must have, if not any."""
    text: Json = {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_TEXT,
        "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]+$",
    }
    return {
        "type": "object",
        "required": ["specversion", "id", "source", "type", *(["data"] if data else [])],
        "properties": {
            "specversion": {"const": "1.0"},
            "id": text,
            "source": {**text, "format": "uri-reference", "pattern": "^[^\\u0000-\\u0020\\u007f-\\u009f]+$"},
            "type": text if kind is None else {"const": kind},
            "subject": text,
            "time": {"type": "string", "format": "date-time"},
            "partitionkey": _TEXT,
            "expirytime": {"type": "string", "format": "date-time"},
            "datacontenttype": {"enum": ["application/json"]},
            "data": data,
        },
        "propertyNames": {"pattern": "^[a-z0-9]+$"},
        "additionalProperties": {"anyOf": [{**text, "minLength": 0}, {"type": "integer"}, {"type": "boolean"}]},
    }
