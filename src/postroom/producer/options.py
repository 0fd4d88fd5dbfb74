"""What a producer may say about one message: ``task.using(delay=60, key="user-7")``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from postroom.config import DEDUP_WINDOW, Seconds, Uniqueness, check_unique, seconds
from postroom.errors import ConfigurationError, ValidationError
from postroom.message import MAX_PRIORITY

MAX_HEADERS_SIZE = 64 * 1024
MAX_KEY_LENGTH = 255


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """The options of ``using(…)``. Raises ``ConfigurationError`` or ``ValidationError`` naming the option."""

    delay: Seconds | None = None
    """Not before so long from now."""
    at: datetime | None = None
    """Not before this time; it must have a time zone."""
    priority: int | None = None
    """0 to 9, higher first; ``None``: the task's."""
    key: str | None = None
    """Ordering key, for queues and subscriptions declared ``ordered``."""
    idempotency_key: str | None = None
    """All messages with this key within 24 h are one message."""
    headers: Mapping[str, str] | None = None
    expires_in: Seconds | None = None
    """Not started later than so long from now."""
    unique: Uniqueness | None = None
    """The same call is one job until it has ended (``"until_done"``), until it has started (``"until_started"``), or
    for a time. The same call: the same ``idempotency_key`` if one is given, else the same arguments. ``None``: as
    the task says."""
    replace: bool = False
    """With ``unique="until_started"``: a job that still waits is cancelled, and this one takes its place."""
    transaction: Any = None
    """A connection to the broker's own database: the message exists if and only if its open transaction commits."""

    def __post_init__(self) -> None:
        if self.delay is not None and self.at is not None:
            raise ConfigurationError("using(delay=…, at=…): give one of them")
        if self.delay is not None:
            seconds(self.delay, "delay")
        if self.at is not None and self.at.tzinfo is None:
            raise ConfigurationError(f"using(at={self.at!r}): give it a time zone, as datetime.now(timezone.utc)")
        if self.priority is not None and (
            isinstance(self.priority, bool) or self.priority not in range(MAX_PRIORITY + 1)
        ):
            raise ValidationError(f"priority={self.priority!r}: a number from 0 to {MAX_PRIORITY}", field="priority")
        if self.expires_in is not None and not seconds(self.expires_in, "expires_in") > 0:
            raise ValidationError(f"expires_in={self.expires_in!r}: seconds, more than 0", field="expires_in")
        check_unique(self.unique)
        _check_text(self.key, "key")
        _check_text(self.idempotency_key, "idempotency_key")
        _check_headers(self.headers or {})

    def fields(self) -> dict[str, Any]:
        """The message's fields that follow from the options, counted from now."""
        now = time.time()
        result: dict[str, Any] = {"created_at": now}
        if self is NO_OPTIONS:
            return result
        if self.delay is not None:
            result["not_before"] = now + seconds(self.delay, "delay")
        elif self.at is not None:
            result["not_before"] = self.at.timestamp()
        if self.expires_in is not None:
            result["expires_at"] = now + seconds(self.expires_in, "expires_in")
        if self.priority is not None:
            result["priority"] = self.priority
        if self.key is not None:
            result["key"] = self.key
        if self.idempotency_key is not None:
            result["idempotency_key"] = self.idempotency_key
            result["dedup_window"] = DEDUP_WINDOW
        if self.headers:
            result["headers"] = dict(self.headers)
        return result


def _check_text(value: str | None, field: str) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value or len(value) > MAX_KEY_LENGTH:
        raise ValidationError(f"{field}={value!r}: a text of 1 to {MAX_KEY_LENGTH} characters", field=field)
    if not value.isprintable():
        raise ValidationError(f"{field}={value!r}: printable characters only", field=field)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_headers(headers: Mapping[str, str]) -> None:
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name:
            raise ValidationError(f"headers[{name!r}]={value!r}: names and values are text", field="headers")
        if not _is_unicode(name) or not _is_unicode(value):
            raise ValidationError(f"headers[{name!r}]={value!r}: a lone surrogate is no character", field="headers")
        size += len(name) + len(value)
    if size > MAX_HEADERS_SIZE:
        raise ValidationError(
            f"headers: {size:,} characters; the limit is {MAX_HEADERS_SIZE:,}, put data in the body", field="headers"
        )


NO_OPTIONS = PublishOptions()
