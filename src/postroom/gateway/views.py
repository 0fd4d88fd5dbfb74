"""What answers look like: types that are encoded, and described by ``/openapi.json``. What is not so is left out."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

import msgspec

from postroom.broker.base import SubscriptionStats
from postroom.message import DeadLetter, Failure, JobState, Progress
from postroom.producer.job import JobStatus

Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]
"""RFC 3339 in JSON."""

_FIRST, _LAST = 0.0, 253_402_300_799.0
"""Unix times that every reader of JSON can take: 1970 to 9999."""


class View(msgspec.Struct, omit_defaults=True):
    """Something the gateway answers."""


class Accepted(View, kw_only=True):
    """A message that is stored."""

    id: str
    status: Literal["accepted"]
    status_url: str
    queue: str | None = None
    topic: str | None = None
    accepted_at: Moment


class Item(View, kw_only=True):
    """What became of one item of a batch."""

    status: int
    id: str | None = None
    status_url: str | None = None
    problem: dict[str, Any] | None = None


class Batch(View, kw_only=True):
    """What became of a batch, in the order of its items."""

    results: list[Item]


class FailureView(View, kw_only=True):
    """A failed attempt as an embedded problem document."""

    type: str
    title: str
    detail: str
    reason: str
    attempt: int
    failed_at: Moment


class Links(View, kw_only=True):
    """Paths of the same job."""

    self: str
    events: str


class JobView(View, kw_only=True):
    """A job, or an event on its way through its subscriptions."""

    id: str
    state: JobState
    name: str
    topic: str
    attempt: int
    created_at: Moment
    not_before: Moment | None = None
    started_at: Moment | None = None
    finished_at: Moment | None = None
    progress: Progress | None = None
    result: Any = None
    error: FailureView | None = None
    subscriptions: dict[str, JobState]
    links: Links


class Cancelled(View, kw_only=True):
    """``cancelled``: it will never start; ``requested``: it runs, and its worker is told."""

    id: str
    status: Literal["cancelled", "requested"]


class Queues(View, kw_only=True):
    """All queues and subscriptions."""

    queues: list[SubscriptionStats]


class DeadCount(View, kw_only=True):
    """Of one queue or subscription."""

    subscription: str
    dead: int


class DeadCounts(View, kw_only=True):
    """Of all queues and subscriptions."""

    subscriptions: list[DeadCount]


class AttemptView(FailureView, kw_only=True):
    """A failed attempt as operators see it."""

    error: str
    message: str
    traceback: str
    worker: str
    started_at: Moment | None = None


class LetterView(View, kw_only=True):
    """A dead letter with all that is known of it."""

    id: str
    subscription: str
    topic: str
    name: str
    body: Any
    """JSON; as text if it is none."""
    headers: dict[str, str]
    key: str | None = None
    created_at: Moment
    dead_at: Moment
    redriven: int
    failures: list[AttemptView]


class LetterPage(View, kw_only=True):
    """Dead letters, oldest first."""

    dead_letters: list[LetterView]


class RedriveRequest(View, kw_only=True, forbid_unknown_fields=True):
    """These, or without ``ids`` all that are dead now."""

    ids: list[str] | None = None


class Redriven(View, kw_only=True):
    """How many went back."""

    redriven: int


class Health(View, kw_only=True):
    """All is well."""

    status: str


def moment(unix: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(min(max(unix, _FIRST), _LAST), dt.UTC)


def moment_or_none(unix: float | None) -> dt.datetime | None:
    return None if unix is None else moment(unix)


def failure_view(failure: Failure) -> FailureView:
    return FailureView(**_failure(failure))


def job_view(status: JobStatus, path: str) -> JobView:
    return JobView(
        id=status.id,
        state=status.state,
        name=status.name,
        topic=status.topic,
        attempt=status.attempt,
        created_at=moment(status.created_at),
        not_before=moment_or_none(status.not_before),
        started_at=moment_or_none(status.started_at),
        finished_at=moment_or_none(status.finished_at),
        progress=status.progress,
        result=status.result,
        error=None if status.error is None else failure_view(status.error),
        subscriptions=status.subscriptions,
        links=Links(self=path, events=f"{path}/events"),
    )


def letter_view(letter: DeadLetter) -> LetterView:
    message = letter.message
    return LetterView(
        id=message.id,
        subscription=letter.subscription,
        topic=message.topic,
        name=message.name,
        body=_readable(message.body),
        headers=dict(message.headers),
        key=message.key,
        created_at=moment(message.created_at),
        dead_at=moment(letter.dead_at),
        redriven=letter.redriven,
        failures=[
            AttemptView(
                **_failure(failure),
                error=failure.error or failure.reason,
                message=failure.message,
                traceback=failure.traceback,
                worker=failure.worker,
                started_at=moment_or_none(failure.started_at),
            )
            for failure in letter.failures
        ],
    )


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": failure.error or failure.reason,
        "detail": failure.message,
        "reason": failure.reason,
        "attempt": failure.attempt,
        "failed_at": moment(failure.failed_at),
    }


def _readable(body: bytes) -> Any:
    """The body may be why it died."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="backslashreplace")
