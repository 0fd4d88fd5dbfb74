"""Defects of consumers: what is delivered, when, how often, and who may settle it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from postroom.broker.base import (
    Ack,
    Consumer,
    Delivery,
    Outcome,
    Release,
    Retry,
)
from postroom.errors import AlreadySettled, LeaseLost, PostroomError, SettlementError
from postroom.message import Message
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer


class _DuplicatingConsumer(DefectiveConsumer):
    def __init__(self, sound: Consumer) -> None:
        super().__init__(sound)
        self._again: list[Delivery] = []

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        if self._again:
            again, self._again = self._again, []
            return again[:max_messages]
        got = await super().receive(max_messages, timeout)
        self._again = got[-1:]
        return got


class DuplicatesADelivery(DefectiveBroker):
    """Delivers the last of each batch once more."""

    consumer_class = _DuplicatingConsumer


class _EarlyAckingConsumer(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        got = await super().receive(max_messages, timeout)
        await self.sound.settle([(delivery, Ack()) for delivery in got])
        return got

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return [None] * len(settlements)


class AcksEarly(DefectiveBroker):
    """Acks at receive, before any handler has run."""

    consumer_class = _EarlyAckingConsumer


class _DroppingConsumer(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        got = await super().receive(max_messages, timeout)
        return [delivery for delivery in got if delivery.attempt == 1]


class NeverRedelivers(DefectiveBroker):
    """What has failed once is gone."""

    consumer_class = _DroppingConsumer


class _UnfencedConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return [None if isinstance(error, LeaseLost) else error for error in await super().settle(settlements)]


class HasNoFencing(DefectiveBroker):
    """Tells a holder whose lease is lost that it has settled."""

    consumer_class = _UnfencedConsumer


class _RepeatableConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return [None if isinstance(error, AlreadySettled) else error for error in await super().settle(settlements)]


class SettlesTwice(DefectiveBroker):
    """Accepts a second settlement."""

    consumer_class = _RepeatableConsumer


class _LapsingConsumer(DefectiveConsumer):
    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return []


class ExtendsNothing(DefectiveBroker):
    """Answers that leases are renewed, and renews none."""

    consumer_class = _LapsingConsumer


class _HastyConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await super().settle([(delivery, _hastened(outcome)) for delivery, outcome in settlements])


class DeliversEarly(DefectiveBroker):
    """Halves the delay of a retry, and forgets that of a message."""

    consumer_class = _HastyConsumer

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([msgspec.structs.replace(m, not_before=None) for m in messages])


def _hastened(outcome: Outcome) -> Outcome:
    return (
        msgspec.structs.replace(outcome, delay=outcome.delay / 2) if isinstance(outcome, Retry | Release) else outcome
    )


class _UncountingConsumer(DefectiveConsumer):
    def started(self, deliveries: Sequence[Delivery]) -> None:
        """Not noted."""


class ForgetsDeaths(DefectiveBroker):
    """The death of a worker is not counted: a poison message loops."""

    consumer_class = _UncountingConsumer


class _GrippingConsumer(DefectiveConsumer):
    async def close(self) -> None:
        """Keeps all it holds until the leases end."""


class HoldsOnAtClose(DefectiveBroker):
    """A closed consumer releases nothing."""

    consumer_class = _GrippingConsumer


class _GenerousConsumer(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        return await super().receive(max_messages + 1, timeout)


class GivesTooMany(DefectiveBroker):
    """One more than asked for."""

    consumer_class = _GenerousConsumer


class _RestlessConsumer(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        return await super().receive(max_messages, 0.0)


class NeverWaits(DefectiveBroker):
    """A receive returns at once, with or without a message."""

    consumer_class = _RestlessConsumer


class _SlowConsumer(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        return [] if timeout == 0 else await super().receive(max_messages, timeout)


class NeverLooksIn(DefectiveBroker):
    """Who does not wait gets nothing, however often he asks."""

    consumer_class = _SlowConsumer


class _TalkativeConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await super().settle(settlements) or [None]


class MixesAnswers(DefectiveBroker):
    """Answers in the wrong order, and where nothing was asked."""

    consumer_class = _TalkativeConsumer

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return (await super().publish(messages))[::-1] or ["nothing"]


class _StrictConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        errors = await super().settle(settlements)
        return [
            LeaseLost("expired") if delivery.message.expires_at is not None else error
            for (delivery, _), error in zip(settlements, errors, strict=True)
        ]


class RefusesWhatMayExpire(DefectiveBroker):
    """Refuses to settle what has an expiry."""

    consumer_class = _StrictConsumer
