"""The consumer of a queue with lanes: the highest first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from postroom.broker.base import Consumer, Delivery, Outcome, Release
from postroom.broker.refusals import check_count, of_another_consumer
from postroom.clock import Clock
from postroom.errors import PostroomError, SettlementError

logger = logging.getLogger("postroom.broker")

_FIRST_GLANCE = 0.5
_GLANCE = 0.1
"""Seconds a higher lane has to answer before a lower one may serve: at first, and if nobody has looked just now."""
_RECENT = 0.2
"""Seconds after which a look is no longer recent: servers that push have by then taken back what nobody took."""
_SUSPECT_PAUSE = 0.3
"""Seconds for which a suspect goes back while another one, of another lane, is held."""


class _Receipt(msgspec.Struct, eq=False):
    consumer: LaneConsumer
    lane: Consumer
    inner: Delivery
    answered: bool = False
    """The lane has settled it, but in a call that failed for another lane: whoever asks again is told the answer."""
    answer: SettlementError | None = None


class LaneConsumer(Consumer):
    """See :class:`postroom.broker.base.Consumer`. ``lanes``: the consumers of a queue's lanes, with their levels."""

    def __init__(self, queue: str, lanes: Mapping[Consumer, int], lease: float, clock: Clock) -> None:
        self._queue = queue
        self._lanes = dict(sorted(lanes.items(), key=lambda item: -item[1]))
        self._lease = lease
        self._clock = clock
        self._looked_at = dict.fromkeys(self._lanes, 0.0)
        self._suspect: Delivery | None = None
        self._suspect_until = 0.0

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        deadline = None if timeout is None else self._clock.now() + timeout
        found: list[Delivery] = []
        try:
            while True:
                await self._look(found, max_messages, deadline)
                left = None if deadline is None else max(0.0, deadline - self._clock.now())
                if not found and left != 0.0:
                    await self._race(list(self._lanes), found, max_messages, left, None)
                if surplus := self._surplus(found, max_messages):
                    await self._give_back(surplus)
                if found or (deadline is not None and self._clock.now() >= deadline):
                    return found
        except BaseException:
            # Cancelled, or one lane has failed: what the others gave must not stay with nobody until its lease ends.
            await asyncio.shield(self._let_go(found))
            raise

    def started(self, deliveries: Sequence[Delivery]) -> None:
        for lane, items in _by_lane(deliveries):
            lane.started([delivery.receipt.inner for delivery in items])

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        outcomes: dict[Consumer, list[tuple[int, Delivery, Outcome]]] = {}
        answers: list[SettlementError | None] = [None] * len(settlements)
        for at, (delivery, outcome) in enumerate(settlements):
            receipt: _Receipt = delivery.receipt
            if receipt.consumer is not self:
                answers[at] = of_another_consumer(delivery.message.id)
            elif receipt.answered:
                answers[at] = receipt.answer
            else:
                outcomes.setdefault(receipt.lane, []).append((at, delivery, outcome))
        told = await asyncio.gather(
            *(
                lane.settle([(delivery.receipt.inner, outcome) for _, delivery, outcome in items])
                for lane, items in outcomes.items()
            ),
            return_exceptions=True,
        )
        failed = [answer for answer in told if isinstance(answer, BaseException)]
        for items, answer in zip(outcomes.values(), told, strict=True):
            if isinstance(answer, BaseException):
                continue
            for (at, delivery, _), error in zip(items, answer, strict=True):
                answers[at] = delivery.receipt.answer = error
                self._forget(delivery)
                delivery.receipt.answered = True
        if failed:
            raise failed[0]
        for delivery, _ in settlements:
            if delivery.receipt.consumer is self:
                # From now on it was settled before, as its lane says.
                delivery.receipt.answered = False
        return answers

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        lost: set[Any] = set()
        for lane, items in _by_lane(deliveries):
            lost.update(await lane.extend([delivery.receipt.inner for delivery in items]))
        if self._suspect in deliveries:
            self._suspect_until = self._clock.now() + self._lease
        gone = [delivery for delivery in deliveries if delivery.receipt.inner in lost]
        for delivery in gone:
            self._forget(delivery)
        return gone

    async def close(self) -> None:
        for error in await asyncio.gather(*(lane.close() for lane in self._lanes), return_exceptions=True):
            if error is not None:
                raise error

    async def _look(self, found: list[Delivery], count: int, deadline: float | None) -> None:
        """Take what there is, from the highest lane down."""
        higher: list[Consumer] = []
        for lane in self._lanes:
            higher.append(lane)
            last, now = self._looked_at[lane], self._clock.now()
            patience = 0.0 if now - last < _RECENT else _GLANCE if last else _FIRST_GLANCE
            if deadline is not None:
                patience = min(patience, deadline - now)
            if patience > 0:
                if found:
                    return  # It may not wait for the others.
                # In real time, also where the clock is set by hand. Those above go on being looked into.
                await self._race(higher, found, count, None, patience)
            else:
                found += self._taken(lane, await lane.receive(count - len(found), 0.0))
                self._looked_at[lane] = self._clock.now()
            if len(found) >= count:
                return

    async def _race(
        self,
        lanes: Sequence[Consumer],
        found: list[Delivery],
        count: int,
        timeout: float | None,
        patience: float | None,
    ) -> None:
        """Wait for whichever gets a message first."""
        waits = {lane: asyncio.ensure_future(lane.receive(count, timeout)) for lane in lanes}
        try:
            await asyncio.wait(waits.values(), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits.values():
                wait.cancel()
            interrupted = await _ended(waits.values())
            for lane, wait in waits.items():
                self._looked_at[lane] = self._clock.now()
                if not wait.cancelled() and wait.exception() is None:
                    found += self._taken(lane, wait.result())
            if interrupted is not None:
                raise interrupted
        for wait in waits.values():
            if not wait.cancelled() and (error := wait.exception()) is not None:
                raise error

    def _taken(self, lane: Consumer, deliveries: Iterable[Delivery]) -> list[Delivery]:
        return [
            msgspec.structs.replace(
                delivery,
                message=msgspec.structs.replace(delivery.message, topic=self._queue, priority=self._lanes[lane]),
                subscription=self._queue,
                receipt=_Receipt(self, lane, delivery),
            )
            for delivery in deliveries
        ]

    def _surplus(self, found: list[Delivery], count: int) -> list[tuple[Delivery, float]]:
        """Take from ``found`` what may not be handed out, with the seconds for which it goes back."""
        surplus: list[tuple[Delivery, float]] = []
        for delivery in [delivery for delivery in found if delivery.suspect]:
            if self._suspect is not None and self._clock.now() < self._suspect_until:
                found.remove(delivery)
                surplus.append((delivery, _SUSPECT_PAUSE))
            else:
                self._suspect, self._suspect_until = delivery, self._clock.now() + self._lease
        while len(found) > count:
            surplus.append((found.pop(), 0.0))
        return surplus

    async def _give_back(self, surplus: Sequence[tuple[Delivery, float]]) -> None:
        if surplus:
            await self.settle([(delivery, Release(seconds)) for delivery, seconds in surplus])

    async def _let_go(self, found: Sequence[Delivery]) -> None:
        try:
            await self._give_back([(delivery, 0.0) for delivery in found])
        except PostroomError as error:
            # They come back when their leases end.
            logger.warning("%s: could not give back what a failed receive had taken: %s", self._queue, error)

    def _forget(self, delivery: Delivery) -> None:
        if delivery is self._suspect:
            self._suspect = None


async def _ended(tasks: Iterable[asyncio.Future[Any]]) -> asyncio.CancelledError | None:
    """Wait until all have ended, even if cancelled meanwhile, which is the answer: they may have taken messages."""
    interrupted = None
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as error:
            interrupted = error
    return interrupted


def _by_lane(deliveries: Sequence[Delivery]) -> list[tuple[Consumer, list[Delivery]]]:
    lanes: dict[Consumer, list[Delivery]] = {}
    for delivery in deliveries:
        lanes.setdefault(delivery.receipt.lane, []).append(delivery)
    return list(lanes.items())
