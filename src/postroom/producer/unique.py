"""Unique jobs: the same call twice is one job, for as long as is asked."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from postroom.config import Uniqueness, seconds
from postroom.errors import ConfigurationError


def check(unique: Uniqueness | None, replace: bool) -> None:
    """Raise ``ConfigurationError`` for what does not go together."""
    if replace and unique != "until_started":
        raise ConfigurationError(
            f"using(replace=True) with unique={unique!r}: only what waits can be replaced; use unique='until_started'"
        )


def fields(unique: Uniqueness, replace: bool, key: str | None, name: str, body: bytes) -> dict[str, Any]:
    """The message's fields that make it unique. Without a ``key`` the task and its arguments are the key."""
    same = sha256(name.encode() + b"\0" + body).hexdigest()
    made: dict[str, Any] = {"idempotency_key": key or f"unique-{same}"}
    if isinstance(unique, str):
        return {**made, "unique": unique, "replace": replace}
    return {**made, "dedup_window": seconds(unique, "unique")}
