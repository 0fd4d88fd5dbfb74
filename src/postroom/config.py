"""Options as frozen values: every field says its unit and default, and is checked when built."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

from postroom.errors import ConfigurationError
from postroom.message import Unique

Backoff = Callable[[int], float]
"""From the number of the attempt that failed (1, 2, …) to the seconds before the next one."""

Isolation = Literal["process"]

Seconds = float | timedelta
"""A duration: seconds, or a ``timedelta``."""

Uniqueness = Unique | Seconds
"""How long the same call is one job: until it has ended, until it has started, or a time from when it was enqueued."""

MAX_MESSAGE_SIZE = 256 * 1024
LEASE = 30.0
RESULT_TTL = 86_400.0
DEDUP_WINDOW = 86_400.0


@dataclass(frozen=True)
class Exponential:
    """See :func:`exponential`."""

    first: float
    factor: float
    max: float
    jitter: bool

    def __call__(self, attempt: int) -> float:
        # Attempts can be many: the power must not overflow before ``max`` caps it.
        ceiling = self.max
        if attempt < 64:
            ceiling = min(self.max, self.first * self.factor ** (attempt - 1))
        return random.uniform(0.0, ceiling) if self.jitter else ceiling


def exponential(*, first: float = 1.0, factor: float = 2.0, max: float = 300.0, jitter: bool = True) -> Backoff:
    """Waits of ``first`` seconds, then ``factor`` times as long each time, never above ``max`` seconds.

    With ``jitter`` each wait is drawn evenly between 0 and that value ("full jitter"), so that
    messages which failed together do not come back together. Raises ``ConfigurationError``.
    """
    if first < 0 or factor < 1 or max < first:
        raise ConfigurationError(
            f"exponential(first={first}, factor={factor}, max={max}): needs 0 <= first <= max and factor >= 1"
        )
    return Exponential(first, factor, max, jitter)


_DEFAULT_BACKOFF = exponential()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, when and after which errors a message is tried again.

    ``give_up_on`` wins over ``retry_on``; an error that is in neither makes a dead letter at once.
    Raises ``ConfigurationError``.
    """

    max_attempts: int = 5
    """Starts of the handler in all, the first included; after that many failures it is a dead letter."""
    backoff: Backoff = _DEFAULT_BACKOFF
    retry_on: tuple[type[BaseException], ...] = (BaseException,)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigurationError(f"RetryPolicy(max_attempts={self.max_attempts}): at least 1")
        if not callable(self.backoff):
            raise ConfigurationError(
                f"RetryPolicy(backoff={self.backoff!r}): a callable from attempt number to seconds, as exponential()"
            )
        for field in ("retry_on", "give_up_on"):
            value = getattr(self, field)
            if isinstance(value, type):
                object.__setattr__(self, field, (value,))
            elif not isinstance(value, tuple) or not all(isinstance(item, type) for item in value):
                raise ConfigurationError(f"RetryPolicy({field}={value!r}): a tuple of exception classes")

    def retries(self, error: BaseException) -> bool:
        """Whether ``error`` is worth another attempt."""
        return isinstance(error, self.retry_on) and not isinstance(error, self.give_up_on)


@dataclass(frozen=True, kw_only=True)
class HandlerOptions:
    """What a task or a subscription may set about the running of its handler."""

    retry: RetryPolicy = RetryPolicy()
    timeout: float | None = None
    """Seconds one attempt may take; ``None``: as long as it likes."""
    lease: float = LEASE
    """Seconds after which a frozen worker loses the message; renewed at a third while the handler runs."""
    ordered: bool = False
    isolation: Isolation | None = None
    """``"process"``: run in a process of its own, for handlers that burn CPU or may crash."""
    priority: int = 0
    result_ttl: float = RESULT_TTL
    unique: Uniqueness | None = None
    """How long the same call is one job; ``None``: each is a job of its own."""
    transaction: Any = None
    """What opens the transaction the handler runs in; see ``App.task``."""

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigurationError(f"timeout={self.timeout!r}: seconds, more than 0, or None")
        if not self.lease >= 0.1:
            raise ConfigurationError(f"lease={self.lease!r}: seconds, at least 0.1")
        if self.isolation not in (None, "process"):
            raise ConfigurationError(f"isolation={self.isolation!r}: 'process' or None")
        if self.priority not in range(10):
            raise ConfigurationError(f"priority={self.priority!r}: 0 to 9")
        check_unique(self.unique)
        if not self.result_ttl >= 0:
            raise ConfigurationError(f"result_ttl={self.result_ttl!r}: seconds, at least 0")


def seconds(value: Seconds, field: str) -> float:
    """A duration as seconds. Raises ``ConfigurationError`` naming ``field`` if it is negative or no duration."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0 or number == float("inf"):
        raise ConfigurationError(f"{field}={value!r}: give seconds (a number, at least 0) or a timedelta")
    return float(number)


def check_unique(value: Uniqueness | None) -> None:
    """Raise ``ConfigurationError`` unless it is one of the words, a duration, or ``None``."""
    if value is None or value in get_args(Unique):
        return
    if isinstance(value, str) or not seconds(value, "unique") > 0:
        raise ConfigurationError(f"unique={value!r}: 'until_done', 'until_started', or seconds, more than 0")
