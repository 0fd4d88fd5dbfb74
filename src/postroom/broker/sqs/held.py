"""One receive of one message: whose it is, until when, and what is known of those before."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from postroom.broker.base import Delivery
from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.wire import Copy, read, unpack
from postroom.message import Failure

MOST_HIDDEN = 43_200
"""Seconds a message can be kept from others after it was received: 12 h in all (ChangeMessageVisibility)."""
_REMEMBERED = 10_000


class Held:
    """The right to settle a message until ``until``: monotonic time, earlier than the service's own."""

    __slots__ = (
        "consumer",
        "copied",
        "copy",
        "identity",
        "receipt",
        "settled",
        "suspect",
        "taken",
        "uncertain",
        "unreported",
        "until",
    )  # fmt: skip

    def __init__(self, consumer: object, identity: str, receipt: str, copy: Copy, suspect: bool) -> None:
        self.consumer = consumer
        self.identity = identity
        """The service's own id of this copy."""
        self.receipt = receipt
        self.copy = copy
        self.suspect = suspect
        self.taken = self.until = 0.0
        self.settled = False
        self.copied = False
        """Its successor is stored already; only the deletion of this one was not confirmed."""
        self.uncertain = False
        """It may be deleted already."""
        self.unreported = False
        """It was settled, but the call raised for the sake of others."""

    @property
    def alive(self) -> bool:
        return not self.settled and time.monotonic() < self.until

    def longest(self) -> int:
        """Whole seconds for which it can be hidden from now on. More is refused, not cut (ChangeMessageVisibility)."""
        return int(self.taken + MOST_HIDDEN - time.monotonic())

    @property
    def attempt(self) -> int:
        return self.copy.envelope.counted + 1

    def delivery(self, subscription: str) -> Delivery:
        message = unpack(self.copy.text, self.copy.envelope)
        return Delivery(
            message=message, subscription=subscription, attempt=self.attempt, suspect=self.suspect, receipt=self
        )


class Past(msgspec.Struct):
    """What this process knows of the receives of a message in an ordered queue."""

    uncounted: int = 0
    """Receives that ended in a release."""
    failures: tuple[Failure, ...] = ()


class Memory:
    """Of ordered queues only: there a message is given back in its place, where nothing can be written on it."""

    def __init__(self) -> None:
        self._pasts: OrderedDict[str, Past] = OrderedDict()

    def of(self, identity: str) -> Past:
        return self._pasts.get(identity) or Past()

    def note(self, held: Held, failure: Failure | None) -> None:
        """It was given back: after a failure, or uncounted."""
        past, failures = self.of(held.identity), held.copy.envelope.failures
        if failure is None:
            past = Past(past.uncounted + 1, past.failures)
        else:
            past = Past(past.uncounted, (*failures[len(failures) - held.attempt + 1 :], failure))
        self._pasts[held.identity] = past
        self._pasts.move_to_end(held.identity)
        if len(self._pasts) > _REMEMBERED:
            self._pasts.popitem(last=False)

    def forget(self, identity: str) -> None:
        self._pasts.pop(identity, None)


def receive(raw: Mapping[str, Any], kept: Kept, consumer: object, memory: Memory, now: float) -> Held:
    """From what ReceiveMessage answered. Receives that nobody accounted for were deaths of their holders."""
    system = raw.get("Attributes", {})
    ordered = kept.declared.ordered
    identity, receives = str(raw["MessageId"]), int(system.get("ApproximateReceiveCount", 1))
    topic = kept.declared.pattern if not set(kept.declared.pattern) & set("*#") else kept.name
    group = system.get("MessageGroupId") if ordered else None
    copy = read(raw["Body"], raw.get("MessageAttributes", {}), identity, topic, group)
    if copy.envelope.dead_at is not None:
        # A dead letter that Amazon's own redrive moved here as it was, from the console or by StartMessageMoveTask.
        copy = copy.redriven()
    envelope = copy.envelope
    past = memory.of(identity) if ordered else Past()
    first = int(system.get("ApproximateFirstReceiveTimestamp", 0)) / 1000
    early = 0
    if envelope.due is not None and receives > 1 and first < envelope.due:
        # Received before its time and hidden again, each time as long as that may be.
        early = max(1, math.ceil((envelope.due - first) / MOST_HIDDEN))
    told = len(past.failures)
    deaths = max(0, receives - 1 - early - past.uncounted - told)
    if deaths or told:
        lost = tuple(_worker_lost(envelope.counted + told + number, now) for number in range(1, deaths + 1))
        copy = copy.changed(counted=envelope.counted + told + deaths, failures=envelope.failures + past.failures + lost)
    return Held(consumer, identity, str(raw["ReceiptHandle"]), copy, envelope.suspect or deaths > 0)


def _worker_lost(attempt: int, now: float) -> Failure:
    return Failure(
        attempt=attempt,
        reason="worker_lost",
        message="the lease ended and nothing was heard of it: its worker died or was frozen",
        failed_at=now,
    )
