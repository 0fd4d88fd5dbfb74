"""The consumer of a server that keeps the leases itself: what it holds, and what becomes of it when a call fails."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import msgspec

from postroom.broker.base import Consumer, Delivery, Outcome, Release
from postroom.broker.refusals import check_count, consumer_closed, lease_over, of_another_consumer, settled_before
from postroom.clock import Clock
from postroom.errors import PostroomError, SettlementError

logger = logging.getLogger("postroom.broker")

LOOK_AGAIN = 1.0
"""Seconds after which a waiting consumer looks anyhow: no hint is so sure that a message may depend on it."""

Claimed = tuple[list[Delivery], float]
"""Deliveries; or none, and for how many seconds it is no use to look again, unless a hint comes."""

Settlements = Sequence[tuple[Delivery, Outcome]]


class Receipt(msgspec.Struct, eq=False):
    """The lease of a delivery, by whatever the server knows it."""

    consumer: LeasingConsumer
    lease: Any
    alone: bool
    """Its end concerns nothing else."""
    state: Literal["held", "settling", "settled", "lost"] = "held"


class LeasingConsumer(Consumer):
    """An adapter claims, performs and renews; this keeps the books."""

    def __init__(self, name: str, clock: Clock, wake: asyncio.Event) -> None:
        """``wake`` is set when something may have become ready."""
        self._name = name
        self._clock = clock
        self._wake = wake
        self._held: set[Delivery] = set()
        self._suspect: Delivery | None = None
        self._claiming: set[asyncio.Future[Claimed]] = set()
        self._abandoned: set[asyncio.Future[None]] = set()
        self._waiting: list[tuple[Settlements, asyncio.Future[list[bool]]]] = []
        self._performing: asyncio.Future[None] | None = None
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    @abstractmethod
    async def _claim(self, limit: int) -> Claimed:
        """Lease at most so many messages, and ``_take`` each."""

    @abstractmethod
    async def _perform(self, settlements: Settlements) -> list[bool]:
        """Whether each was still held. After an error all may be asked again: the server knows whose settle it was."""

    @abstractmethod
    async def _renew(self, deliveries: Sequence[Delivery]) -> list[bool]:
        """Whether each was still held, and now is for another lease."""

    def wake(self) -> None:
        """Something may have become ready."""
        self._wake.set()

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        clock = self._clock
        deadline = None if timeout is None else clock.now() + timeout
        while True:
            if self._abandoned:
                await asyncio.wait(self._abandoned)
            self._check_open()
            self._wake.clear()
            asked_at = clock.now()
            deliveries, pause = await self._claim_or_give_back(max_messages)
            # What came while it was being closed is released there.
            self._check_open()
            if deliveries or (deadline is not None and clock.now() >= deadline):
                return deliveries
            until = asked_at + min(max(0.0, pause), LOOK_AGAIN)
            await self._rest((until if deadline is None else min(until, deadline)) - clock.now())

    async def settle(self, settlements: Settlements) -> list[SettlementError | None]:
        self._check_open()
        answers: list[SettlementError | None] = []
        todo: dict[int, tuple[Delivery, Outcome]] = {}
        for at, (delivery, outcome) in enumerate(settlements):
            answers.append(self._refusal(delivery))
            if answers[at] is None:
                delivery.receipt.state = "settling"
                todo[at] = (delivery, outcome)
        try:
            settled = await self._perform_together(list(todo.values()))
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
        for delivery, still in zip(held, await self._renew(held), strict=True):
            # One that is just being settled is told there.
            if not still and delivery.receipt.state == "held":
                self._drop(delivery, "lost")
        return [delivery for delivery in deliveries if delivery.receipt.state == "lost"]

    async def close(self) -> None:
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.ensure_future(self._leave())
        await asyncio.shield(self._closing)

    async def _leave(self) -> None:
        self._wake.set()
        if self._claiming:
            await asyncio.wait(self._claiming)
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        if self._performing is not None:
            await asyncio.wait([self._performing])
        await self._release([delivery for delivery in self._held if delivery.receipt.state == "held"])

    async def _rest(self, seconds: float) -> None:
        await self._clock.wait(self._wake, seconds)

    def _take(self, delivery: Delivery) -> Delivery:
        """It is held from now on."""
        self._held.add(delivery)
        if delivery.suspect:
            self._suspect = delivery
        return delivery

    def _drop(self, delivery: Delivery, state: Literal["settled", "lost"]) -> None:
        """It is no longer held."""
        delivery.receipt.state = state
        self._held.discard(delivery)
        if delivery is self._suspect:
            self._suspect = None
            # Now it may take the next.
            self.wake()

    async def _perform_together(self, settlements: Settlements) -> list[bool]:
        """What comes while others are being performed goes in one call, the next: many small ones cost far more."""
        if not settlements:
            return []
        answer: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._waiting.append((settlements, answer))
        if self._performing is None or self._performing.done():
            self._performing = asyncio.ensure_future(self._perform_waiting())
        return await answer

    async def _perform_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                told = iter(await self._perform([pair for settlements, _ in batch for pair in settlements]))
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for settlements, answer in batch:
                done = list(islice(told, len(settlements)))
                if not answer.done():
                    answer.set_result(done)

    async def _claim_or_give_back(self, limit: int) -> Claimed:
        claiming = asyncio.ensure_future(self._claim(limit))
        self._claiming.add(claiming)
        claiming.add_done_callback(self._claiming.discard)
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The server may lease them all the same: they are given back once that is known.
            abandoned = asyncio.ensure_future(self._give_back(claiming))
            self._abandoned.add(abandoned)
            abandoned.add_done_callback(self._abandoned.discard)
            raise

    async def _give_back(self, claiming: asyncio.Future[Claimed]) -> None:
        try:
            deliveries, _ = await claiming
            await self._release(deliveries)
        except PostroomError as error:
            # They come back when their leases end.
            logger.warning("%s: could not give back what a cancelled receive had taken: %s", self._name, error)

    async def _release(self, deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            await self._perform([(delivery, Release()) for delivery in deliveries])
        for delivery in deliveries:
            self._drop(delivery, "lost")

    def _refusal(self, delivery: Delivery) -> SettlementError | None:
        receipt, message_id = delivery.receipt, delivery.message.id
        if receipt.consumer is not self:
            return of_another_consumer(message_id)
        if receipt.state == "lost":
            return lease_over(message_id)
        return None if receipt.state == "held" else settled_before(message_id)

    def _check_open(self) -> None:
        if self._closed:
            raise consumer_closed(self._name)
