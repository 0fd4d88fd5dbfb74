"""One consumer of one subscription."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postroom.broker.base import Consumer, Delivery, Outcome, Release
from postroom.broker.memory.state import Copy, Queue
from postroom.errors import AlreadySettled, BrokerClosed, LeaseLost, SettlementError

if TYPE_CHECKING:
    from postroom.broker.memory.broker import MemoryBroker


class Receipt:
    """The copy and the lease it was claimed under."""

    __slots__ = ("copy", "holder", "settled")

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.holder = copy.holder
        self.settled = False

    @property
    def holds(self) -> bool:
        return self.holder is not None and self.copy.holder is self.holder


class MemoryConsumer(Consumer):
    """Made by ``MemoryBroker.consume``."""

    def __init__(self, broker: MemoryBroker, queue: Queue, lease: float) -> None:
        self._broker = broker
        self._queue = queue
        self._lease = lease
        self._held: dict[Delivery, None] = {}
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._closed = False

    def wake(self) -> None:
        """Something may have become ready. From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        clock = self._broker.clock
        deadline = None if timeout is None else clock.now() + timeout
        while True:
            self._check_open()
            self._wake.clear()
            deliveries = self._claim(max_messages)
            if deliveries:
                return deliveries
            now = clock.now()
            if deadline is not None and now >= deadline:
                return []
            ends = [at for at in (deadline, self._next_due(now)) if at is not None]
            await clock.wait(self._wake, max(0.0, min(ends) - now) if ends else None)

    def started(self, deliveries: Sequence[Delivery]) -> None:
        with self._broker.state.mutex:
            for delivery in deliveries:
                if delivery.receipt.holds:
                    delivery.receipt.copy.noted_start = True

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        self._check_open()
        with self._broker.state.mutex:
            answers = [self._settle(delivery, outcome) for delivery, outcome in settlements]
        self._broker.state.wake_all()
        return answers

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        until = self._broker.clock.now() + self._lease
        lost = []
        with self._broker.state.mutex:
            for delivery in deliveries:
                if delivery.receipt.holds:
                    self._queue.extend(delivery.receipt.copy, until)
                elif not delivery.receipt.settled:
                    self._held.pop(delivery, None)
                    lost.append(delivery)
        return lost

    async def close(self) -> None:
        if self._closed:
            return
        await self.settle([(delivery, Release()) for delivery in self._held])
        self._closed = True
        self._wake.set()
        self._broker.state.waiters.discard(self)
        self._broker.forget(self)

    def _claim(self, limit: int) -> list[Delivery]:
        now = self._broker.clock.now()
        with self._broker.state.mutex:
            self._queue.forget_old(now)
            self._queue.expire(now)
            suspect = not any(delivery.suspect for delivery in self._held)
            # Twice: the first look may only have taken expired leases back.
            copies = self._queue.claim(now, now + self._lease, limit, suspect=suspect) or self._queue.claim(
                now, now + self._lease, limit, suspect=suspect
            )
            deliveries = [self._delivery(copy) for copy in copies]
        self._held.update(dict.fromkeys(deliveries))
        return deliveries

    def _delivery(self, copy: Copy) -> Delivery:
        return Delivery(
            message=copy.message,
            subscription=self._queue.spec.name,
            attempt=copy.failed + 1,
            suspect=copy.suspect,
            receipt=Receipt(copy),
        )

    def _settle(self, delivery: Delivery, outcome: Outcome) -> SettlementError | None:
        receipt: Receipt = delivery.receipt
        job = f"{delivery.message.id} in {delivery.subscription}"
        if receipt.settled:
            return AlreadySettled(f"{job} was settled before")
        self._held.pop(delivery, None)
        if not receipt.holds:
            return LeaseLost(f"the lease of {job} has ended; the message is another worker's")
        receipt.settled = True
        self._queue.settle(receipt.copy, outcome, self._broker.clock.now())
        return None

    def _next_due(self, now: float) -> float | None:
        with self._broker.state.mutex:
            return self._queue.next_due(now)

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerClosed(f"the consumer of {self._queue.spec.name} is closed")
