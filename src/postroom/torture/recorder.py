"""Notes what a worker's broker hands over and what it answers to a settlement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from postroom.broker.base import Ack, Broker, Cancel, Consumer, Dead, Delivery, Outcome, Release, Retry
from postroom.errors import BrokerUnavailable, SettlementError
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer
from postroom.testing.history import Event, Operation, Result

TOKEN = "torture-token"
"""The header that names the errand."""

_OPERATIONS: dict[type[Outcome], Operation] = {
    Ack: "ack", Retry: "retry", Release: "release", Dead: "dead", Cancel: "cancel",
}  # fmt: skip


class RecordingBroker(DefectiveBroker):
    """Passes everything on, without a defect of its own; its consumers write down what passes."""

    def __init__(self, sound: Broker, actor: str, note: Callable[[Event], None]) -> None:
        super().__init__(sound)
        self._actor = actor
        self._note = note

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        consumer = await self.sound.consume(subscription, lease=lease)
        return _RecordingConsumer(consumer, lease, self._actor, self._note)


class _RecordingConsumer(DefectiveConsumer):
    def __init__(self, sound: Consumer, lease: float, actor: str, note: Callable[[Event], None]) -> None:
        super().__init__(sound)
        self._lease = lease
        self._actor = actor
        self._note = note

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        asked = time.monotonic()
        deliveries = await self.sound.receive(max_messages, timeout)
        for delivery in deliveries:
            self._tell("deliver", delivery, "ok", asked)
        return deliveries

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        # A missing answer is an answer: whoever dies in between leaves an ``invoke`` of which nobody knows the outcome.
        for delivery, outcome in settlements:
            self._tell(_OPERATIONS[type(outcome)], delivery, "invoke")
        try:
            refusals = await self.sound.settle(settlements)
        except BrokerUnavailable:
            for delivery, outcome in settlements:
                self._tell(_OPERATIONS[type(outcome)], delivery, "info")
            raise
        for (delivery, outcome), refusal in zip(settlements, refusals, strict=True):
            self._tell(_OPERATIONS[type(outcome)], delivery, "ok" if refusal is None else "fail")
        return refusals

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        asked = time.monotonic()
        try:
            return await self.sound.extend(deliveries)
        finally:
            # On a busy machine a renewal may come too late; whoever takes the message then is in the right.
            if (answered := time.monotonic()) - asked > self._lease / 4:
                self._note(Event(t=asked, op="stall", id=self._actor, until=answered))

    def _tell(
        self, operation: Operation, delivery: Delivery, outcome: Result, asked: float | None = None
    ) -> None:  # fmt: skip
        self._note(
            Event(
                t=time.monotonic(),
                op=operation,
                id=delivery.message.headers.get(TOKEN, ""),
                sub=delivery.subscription,
                attempt=delivery.attempt,
                consumer=self._actor,
                outcome=outcome,
                asked=asked,
                suspect=delivery.suspect and operation == "deliver",
                message=delivery.message.id,
            )
        )
