"""One consumer of one subscription."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from postroom.broker.base import Ack, Delivery, Outcome
from postroom.broker.leasing import LOOK_AGAIN, Claimed, LeasingConsumer, Receipt
from postroom.broker.postgresql import rows
from postroom.broker.postgresql.link import Gone
from postroom.errors import SubscriptionNotFound

if TYPE_CHECKING:
    from postroom.broker.postgresql.broker import PostgreSQLBroker

BATCH = 500
"""Messages claimed or settled by one statement."""
_FIRST_LOOK = 0.02
"""Seconds after which it looks where no hints arrive, or another has what it could take; twice as long each time."""

_CLAIM = "SELECT * FROM ~.claim($1, $2, $3, $4, $5, $6, $7)"
_SETTLE = "SELECT ~.settle($1, $2, $3, $4)"
_EXTEND = "SELECT ~.extend($1, $2, $3, $4, $5)"
_PAUSE = "SELECT ~.pause($1, $2, $3)"
_OWN = 4
"""Columns of a claim that come before those of the message."""


class PostgreSQLConsumer(LeasingConsumer):
    """Made by ``PostgreSQLBroker.consume``."""

    def __init__(self, broker: PostgreSQLBroker, name: str, sub: int, lease: float) -> None:
        super().__init__(name, broker.clock, asyncio.Event())
        self._broker = broker
        self.sub = sub
        self._lease = lease
        self._look = _FIRST_LOOK

    def wake(self) -> None:
        self._look = _FIRST_LOOK
        super().wake()

    def started(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing is noted: whatever its holder had counts when it dies."""

    async def _leave(self) -> None:
        try:
            await super()._leave()
        finally:
            self._broker.forget(self)

    async def _claim(self, limit: int) -> Claimed:
        broker, suspect, most = self._broker, self._suspect, min(limit, BATCH)
        held = (None, None) if suspect is None else (suspect.message.id, suspect.receipt.lease)
        try:
            found = await broker.link.fetch(_CLAIM, self.sub, most, self._lease, broker.holder, *held, broker.moment())
        except Gone:
            raise SubscriptionNotFound(f"{self._name} was deleted while it was consumed") from None
        if not found:
            return [], await self._pause()
        self._look = _FIRST_LOOK
        return [self._delivery(row) for row in found], 0.0

    def _delivery(self, row: Any) -> Delivery:
        lease, failed, suspect, line = row[:_OWN]
        return self._take(
            Delivery(
                message=rows.message(row[_OWN:]),
                subscription=self._name,
                attempt=failed + 1,
                suspect=suspect,
                receipt=Receipt(self, lease, alone=line is None),
            )
        )

    async def _pause(self) -> float:
        """Seconds for which it is no use to look, unless a hint comes."""
        broker = self._broker
        due = await broker.link.value(_PAUSE, self.sub, self._suspect is None, broker.moment())
        if broker.hinted and due != 0:
            return LOOK_AGAIN if due is None else due
        look, self._look = self._look, min(2 * self._look, LOOK_AGAIN)
        return look if not due else min(due, look)

    async def _perform(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[bool]:
        broker = self._broker
        held: list[bool] = []
        for start in range(0, len(settlements), BATCH):
            batch = settlements[start : start + BATCH]
            told = rows.outcomes([(each.message.id, each.receipt.lease, outcome) for each, outcome in batch])
            done = set(await broker.link.value(_SETTLE, self.sub, *told, broker.moment()))
            held += [place in done for place in range(len(batch))]
        if any(not isinstance(outcome, Ack) or not delivery.receipt.alone for delivery, outcome in settlements):
            broker.announce([self.sub])
        return held

    async def _renew(self, deliveries: Sequence[Delivery]) -> list[bool]:
        if not deliveries:
            return []
        broker = self._broker
        ids, leases = [each.message.id for each in deliveries], [each.receipt.lease for each in deliveries]
        kept = {row[0] for row in await broker.link.fetch(_EXTEND, self.sub, ids, leases, self._lease, broker.moment())}
        return [delivery.message.id in kept for delivery in deliveries]
