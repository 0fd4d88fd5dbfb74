"""One message in one subscription, from its publication until it is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from postroom.message import DeadLetter, Failure, JobRecord, JobState, Message, Progress

if TYPE_CHECKING:
    from postroom.broker.memory.subscription import SubscriptionState


class Lease:
    """The right of one consumer to settle a copy. It is lost when the copy has another lease, or none."""

    __slots__ = ("consumer", "copy", "seconds", "settled", "started", "until")

    def __init__(self, copy: Copy, consumer: object, seconds: float, now: float) -> None:
        self.copy = copy
        self.consumer = consumer
        self.seconds = seconds
        self.until = now + seconds
        self.started = False
        """Its handler was about to run: if the lease ends now, that counts as a failure."""
        self.settled = False

    @property
    def alive(self) -> bool:
        return self.copy.lease is self


class Copy:
    """It waits, or runs under a lease, or has ended (``end``): one of the three."""

    __slots__ = (
        "ahead",
        "alarm",
        "cancel_requested",
        "counted",
        "death",
        "end",
        "expires_at",
        "failures",
        "finished_at",
        "forget_at",
        "lease",
        "message",
        "number",
        "placed",
        "progress",
        "ready_since",
        "redriven",
        "replayed",
        "result",
        "started_at",
        "subscription",
        "suspect",
        "visible_at",
    )

    def __init__(self, message: Message, subscription: SubscriptionState, number: int, now: float) -> None:
        self.message = message
        self.subscription = subscription
        self.number = number
        """Publish order."""
        self.visible_at = max(now, message.not_before or 0.0)
        """Not delivered earlier."""
        self.ready_since = self.visible_at
        self.expires_at = message.expires_at
        self.ahead = False
        """Was given back: comes before the others of its priority."""
        self.placed = False
        """Is in its lane, free to be taken."""
        self.lease: Lease | None = None
        self.suspect = False
        self.counted = 0
        """Failures that count against the attempts: those since it was published, redriven or replayed."""
        self.failures: list[Failure] = []
        """All there ever were."""
        self.end: JobState | None = None
        self.death = 0
        """Place in the order in which messages died."""
        self.redriven = 0
        self.replayed = False
        self.cancel_requested = False
        self.started_at: float | None = None
        self.finished_at: float | None = None
        self.forget_at: float | None = None
        self.progress: Progress | None = None
        self.result: bytes | None = None
        self.alarm: float | None = None
        """When the state looks at it next."""

    @property
    def attempt(self) -> int:
        return 1 + self.counted

    def due(self, now: float) -> float | None:
        """When something happens to it if nobody touches it."""
        if self.end is not None:
            return self.forget_at
        if self.lease is not None:
            return self.lease.until
        times = [self.visible_at] if self.visible_at > now else []
        if self.expires_at is not None:
            times.append(self.expires_at)
        return min(times, default=None)

    def state(self, now: float) -> JobState:
        if self.end is not None:
            return self.end
        if self.lease is not None:
            return JobState.RUNNING
        if self.counted:
            return JobState.RETRYING
        return JobState.SCHEDULED if self.visible_at > now else JobState.READY

    def finish(self, end: JobState, now: float, keep: float | None) -> None:
        """End it, to be forgotten after ``keep`` seconds (``None``: never)."""
        self.end = end
        self.finished_at = now
        self.forget_at = None if keep is None else now + keep
        if end is not JobState.DEAD:
            # Its status stays for long; its body would let memory grow with what is already done.
            self.message = msgspec.structs.replace(self.message, body=b"")

    def begin_anew(self, message: Message, now: float) -> None:
        """It has ended and is to be handled once more; attempts from 1, history kept."""
        self.message = message
        self.end = self.finished_at = self.forget_at = self.started_at = None
        self.progress = self.result = None
        self.counted = 0
        self.suspect = self.ahead = self.cancel_requested = False
        self.visible_at = self.ready_since = now

    def record(self, now: float) -> JobRecord:
        state = self.state(now)
        return JobRecord(
            id=self.message.id,
            subscription=self.subscription.name,
            topic=self.message.topic,
            name=self.message.name,
            state=state,
            attempt=self.attempt,
            created_at=self.message.created_at,
            not_before=self.visible_at if self._is_put_off(now) else None,
            started_at=self.started_at,
            finished_at=self.finished_at,
            expires_at=self.expires_at,
            progress=self.progress,
            result=self.result,
            failures=tuple(self.failures),
        )

    def letter(self) -> DeadLetter:
        return DeadLetter(
            message=self.message,
            subscription=self.subscription.name,
            failures=tuple(self.failures),
            dead_at=self.finished_at or 0.0,
            redriven=self.redriven,
        )

    def _is_put_off(self, now: float) -> bool:
        return self.end is None and self.lease is None and self.visible_at > now
