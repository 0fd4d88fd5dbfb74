"""One consumer of one subscription."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from postroom.broker.base import Ack, Consumer, Delivery, Outcome, Release
from postroom.broker.postgresql import rows
from postroom.broker.postgresql.link import Gone
from postroom.errors import (
    AlreadySettled,
    BrokerClosed,
    ConfigurationError,
    LeaseLost,
    PostroomError,
    SettlementError,
    SubscriptionNotFound,
)

if TYPE_CHECKING:
    from postroom.broker.postgresql.broker import PostgreSQLBroker

logger = logging.getLogger("postroom.broker")

BATCH = 500
"""Messages claimed or settled by one statement."""
LOOK_AGAIN = 1.0
"""Seconds after which a waiting consumer looks anyhow: no hint is so sure that a message may depend on it."""
_FIRST_LOOK = 0.02
"""Seconds after which it looks where no hints arrive, or another has what it could take; twice as long each time."""

_CLAIM = "SELECT * FROM ~.claim($1, $2, $3, $4, $5, $6, $7)"
_SETTLE = "SELECT ~.settle($1, $2, $3, $4)"
_EXTEND = "SELECT ~.extend($1, $2, $3, $4, $5)"
_PAUSE = "SELECT ~.pause($1, $2, $3)"
_OWN = 4
"""Columns of a claim that come before those of the message."""


class Receipt:
    """The lease of a delivery."""

    __slots__ = ("consumer", "in_line", "lease", "state")

    def __init__(self, consumer: PostgreSQLConsumer, lease: int, *, in_line: bool) -> None:
        self.consumer = consumer
        self.lease = lease
        self.in_line = in_line
        """Another of its key may wait behind it."""
        self.state = "held"
        """``held``, ``settling``, ``settled`` or ``lost``."""


class PostgreSQLConsumer(Consumer):
    """Made by ``PostgreSQLBroker.consume``."""

    def __init__(self, broker: PostgreSQLBroker, name: str, sub: int, lease: float) -> None:
        self._broker = broker
        self._name = name
        self.sub = sub
        self._lease = lease
        self._held: set[Delivery] = set()
        self._abandoned: set[asyncio.Future[None]] = set()
        self._suspect: Delivery | None = None
        self._wake = asyncio.Event()
        self._look = _FIRST_LOOK
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Something may have become ready."""
        self._look = _FIRST_LOOK
        self._wake.set()

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        if max_messages < 1:
            raise ConfigurationError(f"receive: max_messages must be at least 1, not {max_messages}")
        clock = self._broker.clock
        deadline = None if timeout is None else clock.now() + timeout
        while True:
            self._check_open()
            if self._abandoned:
                await asyncio.wait(self._abandoned)
            self._wake.clear()
            asked_at = clock.now()
            deliveries = await self._claim(min(max_messages, BATCH))
            if deliveries:
                self._look = _FIRST_LOOK
                return deliveries
            if deadline is not None and clock.now() >= deadline:
                return []
            until = asked_at + await self._pause()
            await clock.wait(self._wake, (until if deadline is None else min(until, deadline)) - clock.now())

    def started(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing is noted: whatever its holder had counts when it dies."""

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        self._check_open()
        answers: list[SettlementError | None] = []
        todo: dict[int, tuple[Delivery, Outcome]] = {}
        for at, (delivery, outcome) in enumerate(settlements):
            answers.append(self._refusal(delivery))
            if answers[at] is None:
                delivery.receipt.state = "settling"
                todo[at] = (delivery, outcome)
        try:
            held = await self._perform(list(todo.values()))
        except BaseException:
            # It may have happened: asked again, the database says so.
            for delivery, _ in todo.values():
                delivery.receipt.state = "held"
            raise
        for (at, (delivery, _)), done in zip(todo.items(), held, strict=True):
            self._drop(delivery, "settled" if done else "lost")
            answers[at] = None if done else self._refusal(delivery)
        return answers

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        broker = self._broker
        held = [delivery for delivery in deliveries if delivery.receipt.state in ("held", "settling")]
        if held:
            ids, leases = [each.message.id for each in held], [each.receipt.lease for each in held]
            kept = await broker.link.fetch(_EXTEND, self.sub, ids, leases, self._lease, broker.moment())
            still = {row[0] for row in kept}
            for delivery in held:
                # One that is just being settled is told there.
                if delivery.message.id not in still and delivery.receipt.state == "held":
                    self._drop(delivery, "lost")
        return [delivery for delivery in deliveries if delivery.receipt.state == "lost"]

    async def close(self) -> None:
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._wake.set()
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        held = [delivery for delivery in self._held if delivery.receipt.state == "held"]
        try:
            await self._perform([(delivery, Release()) for delivery in held])
        finally:
            for delivery in held:
                self._drop(delivery, "lost")
            self._broker.forget(self)

    async def _claim(self, limit: int) -> list[Delivery]:
        claiming = asyncio.ensure_future(self._claimed(limit))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The server may lease them all the same: they are given back once that is known.
            abandoned = asyncio.ensure_future(self._give_back(claiming))
            self._abandoned.add(abandoned)
            abandoned.add_done_callback(self._abandoned.discard)
            raise

    async def _claimed(self, limit: int) -> list[Delivery]:
        broker, suspect = self._broker, self._suspect
        held = (None, None) if suspect is None else (suspect.message.id, suspect.receipt.lease)
        try:
            found = await broker.link.fetch(_CLAIM, self.sub, limit, self._lease, broker.holder, *held, broker.moment())
        except Gone:
            raise SubscriptionNotFound(f"{self._name} was deleted while it was consumed") from None
        return [self._delivery(row) for row in found]

    def _delivery(self, row: Any) -> Delivery:
        lease, failed, suspect, line = row[:_OWN]
        delivery = Delivery(
            message=rows.message(row[_OWN:]),
            subscription=self._name,
            attempt=failed + 1,
            suspect=suspect,
            receipt=Receipt(self, lease, in_line=line is not None),
        )
        self._held.add(delivery)
        if suspect:
            self._suspect = delivery
        return delivery

    async def _pause(self) -> float:
        """Seconds for which it is no use to look, unless a hint comes."""
        broker = self._broker
        due = await broker.link.value(_PAUSE, self.sub, self._suspect is None, broker.moment())
        if broker.hinted and due != 0:
            return LOOK_AGAIN if due is None else min(due, LOOK_AGAIN)
        look, self._look = self._look, min(2 * self._look, LOOK_AGAIN)
        return look if not due else min(due, look)

    async def _perform(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[bool]:
        """Whether each was still held."""
        broker = self._broker
        held: list[bool] = []
        for start in range(0, len(settlements), BATCH):
            batch = settlements[start : start + BATCH]
            told = rows.outcomes([(each.message.id, each.receipt.lease, outcome) for each, outcome in batch])
            done = set(await broker.link.value(_SETTLE, self.sub, *told, broker.moment()))
            held += [place in done for place in range(len(batch))]
        if any(not isinstance(outcome, Ack) or delivery.receipt.in_line for delivery, outcome in settlements):
            broker.announce([self.sub])
        return held

    def _refusal(self, delivery: Delivery) -> SettlementError | None:
        receipt, message_id = delivery.receipt, delivery.message.id
        if receipt.consumer is not self:
            return LeaseLost(f"message {message_id} was delivered to another consumer")
        if receipt.state == "lost":
            return LeaseLost(f"the lease of message {message_id} is over; it belongs to somebody else now")
        if receipt.state != "held":
            return AlreadySettled(f"message {message_id} was settled before; the first settlement stands")
        return None

    def _drop(self, delivery: Delivery, state: str) -> None:
        """It is no longer held."""
        delivery.receipt.state = state
        self._held.discard(delivery)
        if delivery is self._suspect:
            self._suspect = None
            # Now it may take the next.
            self.wake()

    async def _give_back(self, claiming: asyncio.Future[list[Delivery]]) -> None:
        try:
            deliveries = await claiming
            if deliveries:
                await self._perform([(delivery, Release()) for delivery in deliveries])
                for delivery in deliveries:
                    self._drop(delivery, "lost")
        except PostroomError as error:
            # They come back when their leases end.
            logger.warning("%s: could not give back what a cancelled receive had taken: %s", self._name, error)

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerClosed(f"the consumer of {self._name} was closed; open a new one")
