"""One consumer of one subscription."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import msgspec

from postroom.broker.base import Ack, Dead, Delivery, Outcome, Release, Retry, Subscription
from postroom.broker.leasing import LOOK_AGAIN, Claimed, LeasingConsumer, Receipt
from postroom.broker.redis import records
from postroom.broker.redis.bell import Bell
from postroom.broker.redis.lifeline import Lifeline
from postroom.broker.redis.link import Gone, Link
from postroom.broker.redis.topology import missing
from postroom.clock import Clock
from postroom.errors import BrokerUnavailable
from postroom.message import Message

logger = logging.getLogger("postroom.broker")

BATCH = 500
"""Messages claimed by one script: the server does nothing else meanwhile."""
SETTLE_BATCH = 1000
_numbers = count(1)


class RedisConsumer(LeasingConsumer):
    """Made by ``RedisBroker.consume``."""

    def __init__(
        self,
        link: Link,
        lifeline: Lifeline,
        clock: Clock,
        item: Subscription,
        lease: float,
        closed: Callable[[RedisConsumer], None],
    ) -> None:
        self.holder = f"{lifeline.process}-{next(_numbers)}"
        self.subscription = records.escape(item.name)
        self._bell = Bell(link, link.key("sub", self.subscription, "bell"))
        super().__init__(item.name, clock, self._bell.rung)
        self._link = link
        self._lifeline = lifeline
        self._lease = lease
        self._on_close = closed
        self._turns = count(1)
        self._unanswered: deque[int] = deque(maxlen=100)
        """Turns that may have taken messages, which nobody here has heard of."""
        self._leases_key = link.key("sub", self.subscription, "leases")
        self._started_key = link.key("sub", self.subscription, "started")

    def started(self, deliveries: Sequence[Delivery]) -> None:
        leases = [delivery.receipt.lease for delivery in deliveries if delivery.receipt.state == "held"]
        if leases:
            self._lifeline.started(self._leases_key, self._started_key, leases)

    async def _leave(self) -> None:
        try:
            await self._bell.close()
            await super()._leave()
            await self._link.run("settle", self.subscription, 0, self.holder)
        finally:
            self._on_close(self)

    async def _rest(self, seconds: float) -> None:
        self._bell.waiting += 1
        try:
            self._bell.listen()
            await super()._rest(seconds)
        finally:
            self._bell.waiting -= 1

    async def _claim(self, limit: int) -> Claimed:
        if not self._lifeline.stands:
            # What is taken now may start at once, and a note of it would wait for the next sign of life.
            await self._lifeline.connect()
        turn = next(self._turns)
        suspect = "" if self._suspect is None else self._suspect.receipt.lease
        most, unanswered = min(limit, BATCH), self._unanswered
        given = (self.holder, turn, repr(self._lease), most, suspect, len(unanswered), *unanswered)
        try:
            told = await self._link.run("claim", self.subscription, *given)
        except Gone:
            raise missing(self._name) from None
        except BrokerUnavailable:
            unanswered.append(turn)
            raise
        unanswered.clear()
        deliveries: list[Delivery] = []
        for at in range(2, len(told), 2):
            message_id = told[at].decode()
            if told[at + 1]:
                deliveries.append(self._delivery(message_id, turn, records.mapping(told[at + 1])))
            else:
                logger.error("%s: message %s was deleted from the server before it was handled", self._name, message_id)
        return deliveries, float(told[1]) if told[1] else LOOK_AGAIN

    def _delivery(self, message_id: str, turn: int, stored: records.Fields) -> Delivery:
        alone = b"ordered" not in stored and b"expires" not in stored and b"holds" not in stored
        return self._take(
            Delivery(
                message=records.message(message_id, stored),
                subscription=self._name,
                attempt=records.attempt(stored),
                suspect=stored.get(b"suspect") == b"1",
                receipt=Receipt(self, f"{self.holder}/{turn}/{message_id}", alone=alone),
            )
        )

    async def _perform(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[bool]:
        told: list[bool] = []
        for start in range(0, len(settlements), SETTLE_BATCH):
            batch = settlements[start : start + SETTLE_BATCH]
            rows: list[Any] = []
            for delivery, outcome in batch:
                receipt = delivery.receipt
                rows += (receipt.lease, *_operation(outcome, delivery.message, receipt.alone))
            told += map(bool, await self._link.run("settle", self.subscription, len(batch), *rows, ""))
        return told

    async def _renew(self, deliveries: Sequence[Delivery]) -> list[bool]:
        kept: list[bool] = []
        for start in range(0, len(deliveries), BATCH):
            leases = [delivery.receipt.lease for delivery in deliveries[start : start + BATCH]]
            answers = await self._link.run("extend", self.subscription, repr(self._lease), len(leases), *leases)
            kept += map(bool, answers)
        return kept


def _operation(outcome: Outcome, message: Message, alone: bool) -> tuple[Any, ...]:
    """What the script is told: a verb and its values."""
    if isinstance(outcome, Ack):
        return "plain" if alone else "ack", repr(message.result_ttl), outcome.result or b""
    if isinstance(outcome, Retry):
        return "retry", repr(outcome.delay), msgspec.json.encode(outcome.failure), "1" if outcome.suspect else ""
    if isinstance(outcome, Release):
        return "release", repr(outcome.delay)
    if isinstance(outcome, Dead):
        return "dead", msgspec.json.encode(outcome.failure)
    return ("cancel",)
