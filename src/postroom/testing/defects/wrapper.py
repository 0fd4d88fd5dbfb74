"""A broker around another that passes everything on: what planted defects are built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from postroom.broker.base import (
    Broker,
    Capabilities,
    Consumer,
    Delivery,
    Outcome,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.errors import PostroomError, SettlementError
from postroom.message import DeadLetter, Message
from postroom.store.base import JobStore
from postroom.testing.harness import Harness


class DefectiveConsumer(Consumer):
    """Passes everything on; a defect overrides one thing."""

    def __init__(self, sound: Consumer) -> None:
        self.sound = sound

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        return await self.sound.receive(max_messages, timeout)

    def started(self, deliveries: Sequence[Delivery]) -> None:
        self.sound.started(deliveries)

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await self.sound.settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self.sound.extend(deliveries)

    async def close(self) -> None:
        await self.sound.close()


class DefectiveBroker(Broker):
    """Passes everything on; a defect overrides one thing, or names the ``consumer_class`` that does."""

    consumer_class: type[DefectiveConsumer] = DefectiveConsumer

    def __init__(self, sound: Broker) -> None:
        self.sound = sound
        self.capabilities: Capabilities = self.declared()  # type: ignore[misc]

    def declared(self) -> Capabilities:
        """What it says it can do."""
        return self.sound.capabilities

    async def connect(self) -> None:
        await self.sound.connect()

    async def close(self) -> None:
        await self.sound.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await self.sound.declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await self.sound.publish(messages)

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        return self.consumer_class(await self.sound.consume(subscription, lease=lease))

    async def stats(self) -> list[SubscriptionStats]:
        return await self.sound.stats()

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        return await self.sound.dead_letters(subscription, ids=ids, after=after, limit=limit)

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self.sound.redrive(subscription, ids)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self.sound.discard(subscription, ids)

    async def purge(self, subscription: str) -> int:
        return await self.sound.purge(subscription)

    async def unsubscribe(self, subscription: str) -> None:
        await self.sound.unsubscribe(subscription)

    async def replay(self, subscription: str, since: float | None = None) -> int:
        return await self.sound.replay(subscription, since)

    def joins(self, connection: Any) -> bool:
        return self.sound.joins(connection)

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return self.sound.publish_in(connection, messages)

    @property
    def jobs(self) -> JobStore:
        return self.sound.jobs


class DefectiveHarness(Harness):
    """Another harness, with one defect in each of its brokers."""

    def __init__(self, sound: Harness, defect: type[DefectiveBroker]) -> None:
        self.sound = sound
        self._defect = defect
        self.clock = sound.clock
        self.unit, self.slack, self.patience = sound.unit, sound.slack, sound.patience

    def make_broker(self) -> Broker:
        return self._defect(self.sound.make_broker())

    async def start(self) -> None:
        await self.sound.start()

    async def restart(self) -> None:
        await self.sound.restart()

    async def stop(self) -> None:
        await self.sound.stop()
