"""What travels: messages, and what is remembered of their failures.

Everything here is a plain, immutable value. Times are unix seconds as ``float``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import msgspec

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

MAX_PRIORITY = 9

Unique = Literal["until_done", "until_started"]
"""How long a message keeps others with its key out: until it has ended, in whichever way, or until it first starts."""


def new_id() -> str:
    """A fresh message id: a UUID version 7 (RFC 9562 §5.7), so ids sort by creation time."""
    global _stamp
    milliseconds, text = _stamp
    now = time.time_ns() // 1_000_000
    if now != milliseconds:
        digits = f"{now:012x}"
        text = f"{digits[:8]}-{digits[8:]}-"
        _stamp = (now, text)
    try:
        return text + _tails.pop()
    except IndexError:
        return text + _refill()


# Asking the kernel for randomness, and writing it as text, cost more than all the rest of making a message.
_stamp = (0, "")
_tails: list[str] = []
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def _refill() -> str:
    """Make the random ends of the next ids. Returns one of them."""
    random = os.urandom(10 * 256).hex()
    made = [
        f"7{random[at : at + 3]}-{_VARIANT[random[at + 3]]}{random[at + 4 : at + 7]}-{random[at + 7 : at + 19]}"
        for at in range(0, len(random), 20)
    ]
    tail = made.pop()
    _tails.extend(made)
    return tail


if hasattr(os, "register_at_fork"):
    # A forked child would make the same ids as its parent.
    os.register_at_fork(after_in_child=_tails.clear)


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message as the broker stores it: bytes and metadata, nothing decoded.

    The id is made before the first publish and survives retries, dead-lettering and redrive.
    """

    id: str
    topic: str
    """The topic, or for a job its queue."""
    name: str
    """The task's name, or the event's type; the CloudEvents ``type``."""
    body: bytes
    """The payload; a JSON object for jobs."""
    headers: Mapping[str, str] = NO_HEADERS
    """Text metadata, visible to handlers and to ``where`` filters."""
    key: str | None = None
    """Ordering key: in an ordered subscription, messages of one key run one at a time."""
    priority: int = 0
    """0 to 9; higher runs first among the ready messages of a subscription."""
    created_at: float = 0.0
    not_before: float | None = None
    """Not delivered earlier than this unix time; ``None``: at once."""
    expires_at: float | None = None
    """Not started later than this unix time; ``None``: never expires."""
    idempotency_key: str | None = None
    """Messages to one topic with one key within the window are one message."""
    dedup_window: float = 86_400.0
    """Seconds for which ``idempotency_key`` is remembered."""
    unique: Unique | None = None
    """Instead of a window: ``idempotency_key`` is held by the first message itself, for so long."""
    replace: bool = False
    """If the key is held by another, that one is cancelled and this one takes its place. With ``until_started``."""
    result_ttl: float = 86_400.0
    """Seconds for which status and result are kept once the job has ended."""


FailureReason = Literal["error", "timeout", "rejected", "worker_lost", "undecodable", "invalid", "unknown_task"]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why one attempt failed, in a form that outlives the process: text only."""

    attempt: int
    """Which attempt, counted from 1."""
    reason: FailureReason
    error: str = ""
    """The exception's qualified class name; empty if there was no exception."""
    message: str = ""
    traceback: str = ""
    worker: str = ""
    """The worker that ran it: ``host:pid``."""
    started_at: float | None = None
    failed_at: float = 0.0


class JobState(StrEnum):
    """Where a job, or one subscription's copy of an event, is."""

    SCHEDULED = "scheduled"
    """Waits for its time."""
    READY = "ready"
    """Waits for a worker."""
    RUNNING = "running"
    """A worker holds it."""
    RETRYING = "retrying"
    """Failed at least once, waits for its next attempt."""
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    """Failed for good; kept among the dead letters until redriven or discarded."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Its ``expires_at`` passed before it was started."""

    @property
    def final(self) -> bool:
        """Whether the job has ended (a dead one can still be redriven by a person)."""
        return self in _FINAL


_FINAL = frozenset({JobState.SUCCEEDED, JobState.DEAD, JobState.CANCELLED, JobState.EXPIRED})


class Progress(msgspec.Struct, frozen=True):
    """How far a running handler says it is."""

    fraction: float
    """0.0 to 1.0."""
    text: str = ""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one message in one subscription."""

    id: str
    subscription: str
    topic: str
    name: str
    state: JobState
    attempt: int
    """The attempt that runs, or ran last, or comes next; counted from 1."""
    created_at: float
    not_before: float | None = None
    """When the next attempt may start, while scheduled or retrying."""
    started_at: float | None = None
    """When the latest attempt began."""
    finished_at: float | None = None
    expires_at: float | None = None
    progress: Progress | None = None
    result: bytes | None = None
    """The handler's return value as JSON; ``None`` unless succeeded with a result."""
    failures: tuple[Failure, ...] = ()
    """Every failed attempt since the message was first published, oldest first."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that failed for good, with all that is known of it."""

    message: Message
    subscription: str
    failures: tuple[Failure, ...]
    """Every failed attempt, oldest first; the last one is why it died."""
    dead_at: float
    redriven: int = 0
    """How often it was redriven before."""
