"""One consumer of one subscription."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import msgspec

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Outcome, Release, Retry, Subscription
from postroom.broker.redis import records
from postroom.broker.redis.bell import Bell
from postroom.broker.redis.link import Gone, Link
from postroom.broker.redis.notes import Notes
from postroom.broker.redis.topology import missing
from postroom.clock import Clock
from postroom.errors import (
    AlreadySettled,
    BrokerClosed,
    ConfigurationError,
    LeaseLost,
    PostroomError,
    SettlementError,
)
from postroom.message import Message

logger = logging.getLogger("postroom.broker")

BATCH = 500
"""Messages claimed by one script: the server does nothing else meanwhile."""
SETTLE_BATCH = 1000
LOOK_AGAIN = 1.0
"""Seconds after which a waiting consumer looks anyhow: for the dead, and because a token may go down with its taker."""


class Receipt:
    """The lease of a delivery, by its name on the server."""

    __slots__ = ("consumer", "lease", "plain", "state")

    def __init__(self, consumer: RedisConsumer, lease: str, *, plain: bool) -> None:
        self.consumer = consumer
        self.lease = lease
        self.plain = plain
        """Neither ordered nor expiring: its end concerns nothing else."""
        self.state = "held"
        """``held``, ``settling``, ``settled`` or ``lost``."""


class RedisConsumer(Consumer):
    """Made by ``RedisBroker.consume``."""

    def __init__(
        self,
        link: Link,
        notes: Notes,
        clock: Clock,
        item: Subscription,
        lease: float,
        closed: Callable[[RedisConsumer], None],
    ) -> None:
        self.holder = f"{socket.gethostname()}:{os.getpid()}.{os.urandom(4).hex()}".replace("/", "-")
        self.subscription = records.escape(item.name)
        self._link = link
        self._notes = notes
        self._clock = clock
        self._name = item.name
        self._lease = lease
        self._on_close = closed
        self._turns = count(1)
        self._held: set[Delivery] = set()
        self._abandoned: set[asyncio.Future[None]] = set()
        self._suspect: Delivery | None = None
        self._bell = Bell(link, link.key("sub", self.subscription, "bell"))
        self._leases_key = link.key("sub", self.subscription, "leases")
        self._started_key = link.key("sub", self.subscription, "started")
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        if max_messages < 1:
            raise ConfigurationError(f"receive: max_messages must be at least 1, not {max_messages}")
        deadline = None if timeout is None else self._clock.now() + timeout
        while True:
            self._check_open()
            if self._abandoned:
                await asyncio.wait(self._abandoned)
            self._bell.rung.clear()
            asked_at = self._clock.now()
            deliveries, pause = await self._claim(min(max_messages, BATCH))
            if deliveries or (deadline is not None and self._clock.now() >= deadline):
                return deliveries
            ends = [asked_at + pause] if deadline is None else [asked_at + pause, deadline]
            await self._wait(min(ends) - self._clock.now())

    def started(self, deliveries: Sequence[Delivery]) -> None:
        leases = [delivery.receipt.lease for delivery in deliveries if delivery.receipt.state == "held"]
        if leases:
            self._notes.started(self._leases_key, self._started_key, leases)

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
            settled = await self._perform(list(todo.values()))
        except BaseException:
            # It may have happened: asked again, the server says so.
            for delivery, _ in todo.values():
                delivery.receipt.state = "held"
            raise
        for (at, (delivery, _)), done in zip(todo.items(), settled, strict=True):
            self._drop(delivery, "settled" if done else "lost")
            answers[at] = None if done else self._refusal(delivery)
        return answers

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        held = [delivery for delivery in deliveries if delivery.receipt.state in ("held", "settling")]
        for start in range(0, len(held), BATCH):
            batch = held[start : start + BATCH]
            leases = [delivery.receipt.lease for delivery in batch]
            kept = await self._link.run("extend", self.subscription, repr(self._lease), len(leases), *leases)
            for delivery, still in zip(batch, kept, strict=True):
                # One that is just being settled is told there.
                if not still and delivery.receipt.state == "held":
                    self._drop(delivery, "lost")
        return [delivery for delivery in deliveries if delivery.receipt.state == "lost"]

    async def close(self) -> None:
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._bell.rung.set()
        await self._bell.close()
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        held = [delivery for delivery in self._held if delivery.receipt.state == "held"]
        await self._perform([(delivery, Release()) for delivery in held], leaving=True)
        for delivery in held:
            self._drop(delivery, "lost")
        self._on_close(self)

    async def _claim(self, limit: int) -> tuple[list[Delivery], float]:
        """Deliveries; or none, and how many seconds until there may be some."""
        claiming = asyncio.ensure_future(self._claimed(limit))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The server may lease them all the same: they are given back once that is known.
            abandoned = asyncio.ensure_future(self._give_back(claiming))
            self._abandoned.add(abandoned)
            abandoned.add_done_callback(self._abandoned.discard)
            raise

    async def _claimed(self, limit: int) -> tuple[list[Delivery], float]:
        turn = next(self._turns)
        suspect = "" if self._suspect is None else self._suspect.receipt.lease
        try:
            told = await self._link.run(
                "claim", self.subscription, self.holder, turn, repr(self._lease), limit, suspect
            )
        except Gone:
            raise missing(self._name) from None
        deliveries = [
            self._delivery(told[at].decode(), turn, records.mapping(told[at + 1])) for at in range(2, len(told), 2)
        ]
        pause = float(told[1]) if told[1] else LOOK_AGAIN
        return deliveries, min(max(0.0, pause), LOOK_AGAIN)

    def _delivery(self, message_id: str, turn: int, stored: records.Fields) -> Delivery:
        plain = b"ordered" not in stored and b"expires" not in stored
        delivery = Delivery(
            message=records.message(message_id, stored),
            subscription=self._name,
            attempt=records.attempt(stored),
            suspect=stored.get(b"suspect") == b"1",
            receipt=Receipt(self, f"{self.holder}/{turn}/{message_id}", plain=plain),
        )
        self._held.add(delivery)
        if delivery.suspect:
            self._suspect = delivery
        return delivery

    async def _perform(self, settlements: Sequence[tuple[Delivery, Outcome]], *, leaving: bool = False) -> list[bool]:
        """Whether each was still held. After an error all may be asked again: the server knows whose settle it was."""
        told: list[bool] = []
        for start in range(0, max(1, len(settlements)), SETTLE_BATCH):
            batch = settlements[start : start + SETTLE_BATCH]
            rows: list[Any] = []
            for delivery, outcome in batch:
                receipt = delivery.receipt
                rows += (receipt.lease, *_operation(outcome, delivery.message, receipt.plain))
            holder = self.holder if leaving else ""
            told += map(bool, await self._link.run("settle", self.subscription, len(batch), *rows, holder))
        return told

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
            self._bell.rung.set()

    async def _give_back(self, claiming: asyncio.Future[tuple[list[Delivery], float]]) -> None:
        try:
            deliveries, _ = await claiming
            if deliveries:
                await self._perform([(delivery, Release()) for delivery in deliveries])
                for delivery in deliveries:
                    self._drop(delivery, "lost")
        except PostroomError as error:
            # They come back when their leases end.
            logger.warning("%s: could not give back what a cancelled receive had taken: %s", self._name, error)

    async def _wait(self, seconds: float) -> None:
        self._bell.waiting += 1
        try:
            self._bell.listen()
            await self._clock.wait(self._bell.rung, seconds)
        finally:
            self._bell.waiting -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerClosed(f"the consumer of {self._name} was closed; open a new one")


def _operation(outcome: Outcome, message: Message, plain: bool) -> tuple[Any, ...]:
    """What the script is told: a verb and its values."""
    if isinstance(outcome, Ack):
        return "plain" if plain else "ack", repr(message.result_ttl), outcome.result or b""
    if isinstance(outcome, Retry):
        return "retry", repr(outcome.delay), msgspec.json.encode(outcome.failure), "1" if outcome.suspect else ""
    if isinstance(outcome, Release):
        return "release", repr(outcome.delay)
    if isinstance(outcome, Dead):
        return "dead", msgspec.json.encode(outcome.failure)
    return ("cancel",)
