"""What becomes of a delivery: pure functions from what happened to an outcome."""

from __future__ import annotations

import os
import socket
import time
import traceback
from typing import Any

from postroom import codec
from postroom.broker.base import Ack, Dead, Delivery, Outcome, Release
from postroom.broker.base import Retry as RetryOutcome
from postroom.config import HandlerOptions, RetryPolicy
from postroom.errors import DecodeError, EncodeError, ValidationError
from postroom.message import Failure, FailureReason
from postroom.signals import AlreadyProcessed, Reject, Retry, Snooze

MAX_TRACEBACK = 16 * 1024
MAX_TEXT = 4 * 1024

LOST_DELAY = 1.0
"""Longest wait, in seconds, after the death of a process: the death was noticed, the next attempt should be prompt."""


def worker_name() -> str:
    """``host:pid`` of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def succeeded(value: Any, delivery: Delivery, max_size: int) -> Outcome:
    """The handler returned ``value``."""
    try:
        return Ack(encoded(value, delivery.message.name, max_size))
    except EncodeError as error:
        # Its effects are done: running it again would repeat them and fail at the same place.
        return Dead(failure(delivery, "error", error, note="the handler ran to its end, but its result cannot be kept"))


def encoded(value: Any, name: str, max_size: int) -> bytes | None:
    """A handler's result as JSON; ``None`` for none. Raises ``EncodeError``."""
    if value is None:
        return None
    result = codec.encode_field(value, f"{name}: result")
    if len(result) > max_size:
        raise EncodeError(f"{name}: the result has {len(result):,} bytes, the limit is {max_size:,}")
    return result


def failed(error: BaseException, delivery: Delivery, policy: RetryPolicy, started_at: float, max_size: int) -> Outcome:
    """The handler raised ``error``."""
    if isinstance(error, Snooze):
        return Release(error.delay)
    if isinstance(error, AlreadyProcessed):
        return succeeded(error.result, delivery, max_size)
    if isinstance(error, Reject):
        return Dead(failure(delivery, "rejected", error, started_at=started_at))
    told = failure(delivery, "error", error, started_at=started_at)
    if isinstance(error, Retry):
        return _again(delivery, policy, told, delay=error.delay)
    if not policy.retries(error):
        return Dead(told)
    return _again(delivery, policy, told)


def timed_out(delivery: Delivery, options: HandlerOptions, started_at: float) -> Outcome:
    """The handler was ended after ``options.timeout`` seconds."""
    told = failure(delivery, "timeout", None, started_at=started_at, note=f"ended after {options.timeout} s")
    return _again(delivery, options.retry, told)


def lost(delivery: Delivery, policy: RetryPolicy, started_at: float, note: str) -> Outcome:
    """The process that ran the handler died."""
    told = failure(delivery, "worker_lost", None, started_at=started_at, note=note)
    if delivery.attempt >= policy.max_attempts:
        return Dead(told)
    delay = min(_backoff(policy, delivery.attempt), LOST_DELAY)
    return RetryOutcome(delay=delay, failure=told, suspect=True)


def unreadable(error: DecodeError | ValidationError, delivery: Delivery) -> Outcome:
    """The body is not what the handler takes: no attempt can ever succeed."""
    reason: FailureReason = "invalid" if isinstance(error, ValidationError) else "undecodable"
    return Dead(failure(delivery, reason, error))


def used_up(delivery: Delivery, max_attempts: int) -> Outcome:
    """It comes with all its attempts counted: the last ones ended with the death of their worker."""
    return Dead(failure(delivery, "worker_lost", None, note=f"not started again: {max_attempts} attempts are used up"))


def unknown(delivery: Delivery, grace: float) -> Outcome:
    """No worker has known the task for ``grace`` seconds."""
    note = f"no task {delivery.message.name!r} in this app for {grace:.0f} s; deploy it, then redrive"
    return Dead(failure(delivery, "unknown_task", None, note=note))


def failure(
    delivery: Delivery,
    reason: FailureReason,
    error: BaseException | None,
    *,
    started_at: float | None = None,
    note: str = "",
) -> Failure:
    """What is remembered of a failed attempt, as bounded text."""
    kind = type(error)
    text = "" if error is None else str(error)
    return Failure(
        attempt=delivery.attempt,
        reason=reason,
        error="" if error is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        message="; ".join(part for part in (text[:MAX_TEXT], note) if part),
        traceback="" if error is None else "".join(traceback.format_exception(error))[-MAX_TRACEBACK:],
        worker=worker_name(),
        started_at=started_at,
        failed_at=time.time(),
    )


def _again(delivery: Delivery, policy: RetryPolicy, told: Failure, delay: float | None = None) -> Outcome:
    if delivery.attempt >= policy.max_attempts:
        return Dead(told)
    return RetryOutcome(delay=_backoff(policy, delivery.attempt) if delay is None else max(0.0, delay), failure=told)


def _backoff(policy: RetryPolicy, attempt: int) -> float:
    return max(0.0, float(policy.backoff(attempt)))
