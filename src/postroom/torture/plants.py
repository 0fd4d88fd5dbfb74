"""Bugs to be planted: a torture that finds none of them would prove nothing. Most are those of the suite's defects."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from postroom.app import App
from postroom.broker.base import Ack, Dead, Delivery, Outcome, Release, Retry
from postroom.errors import PostroomError, SettlementError, SubscriptionNotFound
from postroom.message import Message, new_id
from postroom.producer.outlet import Outlet
from postroom.testing.defects import DefectiveBroker, DefectiveConsumer, delivering, keeping


class _Forgetting(DefectiveConsumer):
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        got = await super().receive(max_messages, timeout)
        again = [delivery for delivery in got if delivery.attempt > 1]
        await self.sound.settle([(delivery, Ack()) for delivery in again])
        return [delivery for delivery in got if delivery.attempt == 1]


class ForgetsRedeliveries(DefectiveBroker):
    """What comes a second time is taken for done."""

    consumer_class = _Forgetting


class _Miscounting(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await super().settle([(each, _forgotten(how)) for each, how in settlements])


def _forgotten(outcome: Outcome) -> Outcome:
    # Not always: what never counts would never end.
    return Release(outcome.delay) if isinstance(outcome, Retry) and random.random() < 0.5 else outcome


class ForgetsFailures(DefectiveBroker):
    """Counts every second failure."""

    consumer_class = _Miscounting


class _Burying(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await super().settle([(each, Ack() if isinstance(how, Dead) else how) for each, how in settlements])


class DropsTheDead(DefectiveBroker):
    """Keeps no dead letters."""

    consumer_class = _Burying


class LosesOnRestart(DefectiveBroker):
    """What waits is gone when a process comes anew."""

    async def connect(self) -> None:
        await super().connect()
        for stats in await self.sound.stats():
            await self._purge(stats.name)

    async def _purge(self, subscription: str) -> None:
        try:
            await self.sound.purge(subscription)
        except SubscriptionNotFound:
            return  # Not declared yet: this is the first process.


class DropsMessages(DefectiveBroker):
    """Confirms every tenth without storing it."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        stored = [each for each in messages if random.random() < 0.9]
        answers = {each.id: answer for each, answer in zip(stored, await super().publish(stored), strict=True)}
        return [answers.get(each.id, each.id) for each in messages]


class InventsMessages(DefectiveBroker):
    """Stores a second message beside each."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        extra = [msgspec.structs.replace(each, id=new_id(), idempotency_key=None) for each in messages]
        return (await super().publish([*messages, *extra]))[: len(messages)]


_HASTE = 1.0
"""Seconds."""


class HastyOutlet(Outlet):
    """Says that it has sent, and sends a moment later: what a relay does that marks first."""

    def send(self, messages: Sequence[Message], transaction: Any = None) -> list[str | PostroomError]:
        later = threading.Timer(_HASTE, super().send, (list(messages), transaction))
        later.daemon = True
        later.start()
        return [message.id for message in messages]


class Plant(NamedTuple):
    """A bug, and the violations of which at least one must be found."""

    text: str
    finds: tuple[str, ...]
    broker: type[DefectiveBroker] | None = None


PLANTS: dict[str, Plant] = {
    "early-ack": Plant("acks before the handler has run", ("lost",), delivering.AcksEarly),
    "no-fence": Plant("lets a frozen worker settle what another has taken", ("fencing",), delivering.HasNoFencing),
    "mark-before-effect": Plant("commits the inbox's mark before the effect", ("effects",)),
    "no-inbox": Plant("does without ctx.once", ("effects",)),
    "forget-redelivery": Plant("takes redeliveries for done", ("lost",), ForgetsRedeliveries),
    "lose-on-restart": Plant("forgets what waits when a process comes anew", ("lost",), LosesOnRestart),
    "drop-publish": Plant("confirms messages without storing them", ("lost",), DropsMessages),
    "relay-mark-before-send": Plant("removes from the outbox before it sends", ("lost", "order")),
    "ignore-rollback": Plant("sends what was rolled back", ("phantom",)),
    "reorder-keys": Plant("knows no order", ("order",), keeping.ReordersKeys),
    "no-dedup": Plant("knows no idempotency keys", ("copies",), keeping.IgnoresDedup),
    "invent": Plant("stores a second message beside each", ("copies",), InventsMessages),
    "duplicate": Plant("delivers twice without a reason", ("unexplained",), delivering.DuplicatesADelivery),
    "drop-dead": Plant("keeps no dead letters", ("dead letters",), DropsTheDead),
    "miscount": Plant("counts every second failure", ("attempts",), ForgetsFailures),
}


def plant_in(app: App, plant: str | None, actor: str) -> None:
    """What is planted neither in the broker nor in the handlers."""
    if plant == "relay-mark-before-send" and actor.startswith("relay"):
        app.outlet.__class__ = HastyOutlet
