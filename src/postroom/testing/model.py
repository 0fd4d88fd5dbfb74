"""What a subscription must do, said once more and as simply as possible: the oracle of the state machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import msgspec

from postroom.broker.base import Ack, Cancel, Dead, Delivery, Outcome, Release, Retry
from postroom.message import JobState, Message

Answer = Literal["settled", "already", "lost"]


@dataclass(eq=False)
class ModelLease:
    """One hand-over."""

    consumer: int
    until: float
    started: bool = False
    settled: bool = False


@dataclass(eq=False)
class ModelCopy:
    """One message: it waits (``lease`` and ``end`` are None), runs, or has ended.

    A lease that is over, and an expiry that has passed, need not be noticed at once: until the broker shows by an
    answer that it has, both are allowed. Only what it delivers must be right at every moment.
    """

    message: Message
    number: int
    visible_at: float
    expires_at: float | None
    lease: ModelLease | None = None
    end: JobState | None = None
    counted: int = 0
    failures: int = 0
    suspect: bool = False
    cancel_requested: bool = False
    redriven: int = 0

    def runs(self, now: float) -> bool:
        return self.lease is not None and self.lease.until > now

    def lapsed(self, now: float) -> bool:
        return self.lease is not None and self.lease.until <= now

    def expired(self, now: float) -> bool:
        """It has expired, noticed or not."""
        over = self.expires_at is not None and self.expires_at <= now
        return self.end is None and not self.runs(now) and over

    def in_doubt(self, now: float) -> bool:
        """Whether the broker may have noticed something or not."""
        return self.end is None and (self.lapsed(now) or self.expired(now))

    @property
    def may_be_suspect(self) -> bool:
        """It is one, or becomes one when the loss of its lease is noticed."""
        return self.suspect or (self.lease is not None and self.lease.started)

    def is_same(self, message: Message) -> bool:
        """Unchanged; a redriven message no longer expires, and may say so."""
        original = self.message
        if self.redriven and message.expires_at is None:
            original = msgspec.structs.replace(original, expires_at=None)
        return message == original

    def recover(self, now: float) -> None:
        """The broker has noticed that the lease is over."""
        if self.lease is not None and self.lease.started:
            self.counted += 1
            self.failures += 1
            self.suspect = True
        self.give_back(now)

    def give_back(self, visible_at: float) -> None:
        self.lease = None
        self.visible_at = visible_at
        if self.cancel_requested:
            self.end = JobState.CANCELLED

    def shown(self, now: float) -> set[tuple[JobState, int]]:
        """State and number of failures that a record may show."""
        if not self.in_doubt(now):
            return {(self._state(now), self.failures)}
        noticed = replace(self)
        if self.lapsed(now):
            noticed.recover(now)
        allowed = {(self._state(now), self.failures), (noticed._state(now), noticed.failures)}
        if noticed.expired(now):
            allowed.add((JobState.EXPIRED, noticed.failures))
        return allowed

    def _state(self, now: float) -> JobState:
        if self.end is not None:
            return self.end
        if self.lease is not None:
            return JobState.RUNNING
        if self.counted:
            return JobState.RETRYING
        return JobState.SCHEDULED if self.visible_at > now else JobState.READY


@dataclass
class Model:
    """One subscription with all its messages, in publish order; nothing is indexed, everything is derived."""

    ordered: bool
    lease: float
    copies: dict[str, ModelCopy] = field(default_factory=dict)
    keys: dict[str, tuple[str, bytes, float]] = field(default_factory=dict)
    """Idempotency key -> (first id, body, end of the window)."""
    deaths: list[str] = field(default_factory=list)
    """Ids of the dead, in the order of their death."""
    numbers: Iterator[int] = field(default_factory=count)

    def publish(self, message: Message, now: float) -> str | None:
        """The id it is stored under, or ``None`` for a conflict."""
        key = message.idempotency_key
        if key is not None and key in self.keys and self.keys[key][2] > now:
            first, body, _ = self.keys[key]
            return first if body == message.body else None
        if key is not None:
            self.keys[key] = (message.id, message.body, now + message.dedup_window)
        visible_at = max(now, message.not_before or 0.0)
        self.copies[message.id] = ModelCopy(message, next(self.numbers), visible_at, message.expires_at)
        return message.id

    def deliverable(self, now: float, *, certain: bool) -> list[ModelCopy]:
        """All that may be delivered; if ``certain``, those that must be: nothing unnoticed is before them."""
        return [copy for copy in self.copies.values() if self._may_go(copy, now) and self._is_next(copy, now, certain)]

    def deliver(self, delivery: Delivery, consumer: int, now: float) -> ModelLease:
        copy = self.copies[delivery.message.id]
        if copy.lapsed(now):
            copy.recover(now)
        copy.lease = ModelLease(consumer, now + self.lease)
        return copy.lease

    def holds_suspect(self, consumer: int, now: float, *, lapsed: bool) -> bool:
        """``lapsed``: also one whose lease is over, which the consumer may not have noticed."""
        return any(
            copy.suspect and copy.lease is not None and copy.lease.consumer == consumer and (lapsed or copy.runs(now))
            for copy in self.copies.values()
        )

    def settle(self, message_id: str, lease: ModelLease, outcome: Outcome, answer: Answer, now: float) -> bool:
        """Whether the broker's ``answer`` is right; what follows from it is done."""
        copy = self.copies[message_id]
        if lease.settled:
            return answer == "already"
        if copy.lease is not lease:
            return answer == "lost"
        if answer == "lost" and copy.lapsed(now):
            copy.recover(now)
            return True
        lease.settled = True
        self._perform(copy, outcome, now)
        return answer == "settled"

    def _perform(self, copy: ModelCopy, outcome: Outcome, now: float) -> None:
        copy.lease = None
        if isinstance(outcome, Ack):
            copy.end = JobState.SUCCEEDED
        elif isinstance(outcome, Cancel):
            copy.end = JobState.CANCELLED
        elif isinstance(outcome, Dead):
            copy.failures += 1
            copy.end = JobState.DEAD
            self.deaths.append(copy.message.id)
        elif isinstance(outcome, Retry):
            copy.failures += 1
            copy.counted += 1
            copy.suspect = outcome.suspect
            copy.give_back(now + outcome.delay)
        elif isinstance(outcome, Release):
            copy.give_back(now + outcome.delay)

    def extend(self, message_id: str, lease: ModelLease, renewed: bool, now: float) -> bool:
        """Whether it is right that the lease was ``renewed``, or not; what follows from it is done."""
        copy = self.copies.get(message_id)
        if copy is None or copy.lease is not lease:
            return lease.settled or not renewed
        if renewed:
            lease.until = now + self.lease
        elif copy.lapsed(now):
            copy.recover(now)
        else:
            return False
        return True

    def redrive(self, message_id: str, now: float) -> bool:
        copy = self.copies[message_id]
        if copy.end is not JobState.DEAD:
            return False
        self.deaths.remove(message_id)
        copy.end = copy.expires_at = None
        copy.counted = 0
        copy.redriven += 1
        copy.suspect = copy.cancel_requested = False
        copy.visible_at = now
        return True

    def discard(self, message_id: str) -> bool:
        if self.copies[message_id].end is not JobState.DEAD:
            return False
        self.deaths.remove(message_id)
        del self.copies[message_id]
        return True

    def cancel(self, message_id: str, answer: str, now: float) -> bool:
        """Whether the broker's ``answer`` is right; what follows from it is done."""
        copy = self.copies[message_id]
        if copy.end is not None:
            return answer == "finished"
        if copy.lease is not None and answer == "requested":
            copy.cancel_requested = True
            return True
        if copy.runs(now):
            return False
        finished = copy.expired(now) or copy.cancel_requested
        if copy.lapsed(now):
            copy.recover(now)
        if copy.end is None:
            copy.end = JobState.EXPIRED if answer == "finished" else JobState.CANCELLED
        return answer == "cancelled" or (answer == "finished" and finished)

    def counts(self, now: float) -> dict[str, int]:
        """As in the stats; to be asked only while nothing is in doubt."""
        live = [copy for copy in self.copies.values() if copy.end is None]
        ready, running = len(self.deliverable(now, certain=True)), sum(copy.runs(now) for copy in live)
        found = {"ready": ready, "delayed": len(live) - ready - running, "running": running, "dead": len(self.deaths)}
        return {name: count for name, count in found.items() if count}

    def _may_go(self, copy: ModelCopy, now: float) -> bool:
        if copy.end is not None or copy.runs(now) or copy.expired(now):
            return False
        return not copy.cancel_requested if copy.lapsed(now) else copy.visible_at <= now

    def _is_next(self, copy: ModelCopy, now: float, certain: bool) -> bool:
        if not self.ordered or copy.message.key is None:
            return True
        line = [other for other in self.copies.values() if other.end is None and other.message.key == copy.message.key]
        if not certain:
            line = [
                other for other in line if not other.expired(now) and not (other.lapsed(now) and other.cancel_requested)
            ]
        return all(other is copy or (not other.runs(now) and other.number > copy.number) for other in line)
