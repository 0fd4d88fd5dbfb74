"""The consumer of the memory broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from postroom.broker.base import Consumer, Delivery, Outcome
from postroom.broker.memory.copy import Lease
from postroom.broker.memory.state import State, delivery_of
from postroom.broker.memory.subscription import SubscriptionState, Waiter
from postroom.broker.refusals import check_count, consumer_closed, lease_over, of_another_consumer, settled_before
from postroom.errors import SettlementError


class MemoryConsumer(Consumer):
    """See :class:`postroom.broker.base.Consumer`."""

    def __init__(
        self, state: State, subscription: SubscriptionState, lease: float, closed: Callable[[MemoryConsumer], None]
    ) -> None:
        self._state = state
        self._subscription = subscription
        self._lease = lease
        self._on_close = closed
        self._held: dict[str, Lease] = {}
        self._closed = False

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        # Here a cancellation finds nothing leased yet; and a consumer that always finds something lets others run.
        await asyncio.sleep(0)
        clock = self._state.clock
        deadline = None if timeout is None else clock.now() + timeout
        waiter = Waiter()
        try:
            while True:
                waiter.event.clear()
                with self._open() as state:
                    # Watching before looking: a message that comes in between is not missed.
                    self._subscription.waiters.add(waiter)
                    deliveries = self._claim(state, max_messages)
                    alarm, now = state.alarms.earliest, state.now
                if deliveries or (deadline is not None and now >= deadline):
                    return deliveries
                ends = [end for end in (alarm, deadline) if end is not None]
                await clock.wait(waiter.event, min(ends) - now if ends else None)
        finally:
            with self._state.lock:
                self._subscription.waiters.discard(waiter)

    def started(self, deliveries: Sequence[Delivery]) -> None:
        with self._state.lock:
            for delivery in deliveries:
                delivery.receipt.started = True

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        with self._open() as state:
            return [self._settle(state, delivery, outcome) for delivery, outcome in settlements]

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        with self._open() as state:
            lost = []
            for delivery in deliveries:
                lease = delivery.receipt
                if lease.alive and lease.consumer is self:
                    lease.until = state.now + lease.seconds
                else:
                    lost.append(delivery)
            return lost

    async def close(self) -> None:
        if self._closed:
            return
        with self._open() as state:
            self._closed = True
            state.release([lease for lease in self._held.values() if lease.alive])
            self._held.clear()
            self._subscription.wake()
        self._on_close(self)

    @contextmanager
    def _open(self) -> Iterator[State]:
        with self._state.lock:
            if self._closed:
                raise consumer_closed(self._subscription.name)
            self._state.catch_up()
            yield self._state

    def _claim(self, state: State, count: int) -> list[Delivery]:
        state.check_subscribed(self._subscription)
        self._held = {message_id: lease for message_id, lease in self._held.items() if lease.alive}
        suspects = 0 if any(lease.copy.suspect for lease in self._held.values()) else 1
        leases = state.claim(self._subscription, self, count, suspects, self._lease)
        self._held.update((lease.copy.message.id, lease) for lease in leases)
        return [delivery_of(lease) for lease in leases]

    def _settle(self, state: State, delivery: Delivery, outcome: Outcome) -> SettlementError | None:
        lease: Lease = delivery.receipt
        if lease.consumer is not self:
            return of_another_consumer(delivery.message.id)
        if lease.settled:
            return settled_before(delivery.message.id)
        if not lease.alive:
            return lease_over(delivery.message.id)
        lease.settled = True
        del self._held[delivery.message.id]
        state.settle(lease, outcome)
        return None
