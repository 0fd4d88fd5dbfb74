"""The consumer: claims and settles what its hub has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from postroom.broker.base import Ack, Cancel, Consumer, Dead, Delivery, Outcome, Release, Retry
from postroom.broker.kafka import wire
from postroom.broker.kafka.backlog import Claim
from postroom.broker.kafka.faults import unavailable
from postroom.broker.kafka.hub import Hub
from postroom.broker.kafka.letters import gone_record, letter_record, trial_record
from postroom.broker.kafka.options import Names
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.wire import Envelope, Record
from postroom.broker.refusals import check_count, consumer_closed, lease_over, of_another_consumer, settled_before
from postroom.clock import Clock
from postroom.errors import (
    SettlementError,
    SubscriptionNotFound,
)
from postroom.message import Failure


class KafkaConsumer(Consumer):
    """See :class:`postroom.broker.base.Consumer`."""

    def __init__(
        self, hub: Hub, names: Names, sender: Sender, clock: Clock, lease: float,
        closed: Callable[[KafkaConsumer], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.hub = hub
        self._names = names
        self._sender = sender
        self._clock = clock
        self._lease = lease
        self._on_close = closed
        self._held: set[Claim] = set()
        self._closed = False
        hub.open(lease)

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        event = asyncio.Event()
        self.hub.waiters.add(event)
        try:
            while True:
                self._check_open()
                event.clear()
                deliveries = await self._claim(max_messages)
                if deliveries:
                    return deliveries
                left = None if deadline is None else deadline - loop.time()
                if left is not None and left <= 0:
                    if self.hub.trouble is not None:
                        raise unavailable("cannot receive", self.hub.trouble)
                    return []
                due = self.hub.next_due()
                waits = [
                    wait for wait in (left, None if due is None else due - self._clock.now(), 1.0) if wait is not None
                ]
                await _wait(event, max(0.001, min(waits)))
        finally:
            self.hub.waiters.discard(event)

    async def _claim(self, most: int) -> list[Delivery]:
        self.hub.attend()
        self._held = {claim for claim in self._held if claim.alive}
        claims = self.hub.claim(self, self._held, most, self._lease)
        if not claims:
            return []
        self._held.update(claims)
        try:
            await self.hub.commits.flush()
            self._check_open()
        except BaseException:
            # Cancelled, or not noted: then it must not run, for its death could not be charged.
            self.hub.give_back(claims)
            raise
        until = asyncio.get_running_loop().time() + self._lease
        alive = [claim for claim in claims if claim.alive]
        for claim in alive:
            claim.until = until
        return [claim.delivery(self.hub.name) for claim in alive]

    def started(self, deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            self.hub.note_start(delivery.receipt for delivery in deliveries)

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        self._check_open()
        results: list[SettlementError | None] = []
        batch: dict[Claim, Outcome] = {}
        for delivery, outcome in settlements:
            refusal = self._refusal(delivery, batch)
            results.append(refusal)
            if refusal is None:
                batch[delivery.receipt] = outcome
        if batch:
            await self._perform(batch)
        for number, (delivery, _) in enumerate(settlements):
            if results[number] is None and not delivery.receipt.alive:
                results[number] = lease_over(delivery.message.id)
        trials: list[Record] = []
        for claim, outcome in batch.items():
            if claim.alive:
                claim.settled = True
                self._conclude(claim, outcome, trials)
        if trials:
            # After the commit: lost before it, an attempt would be forgotten; lost after it, only rubbish stays.
            await self._sender.send(trials)
        return results

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        until = asyncio.get_running_loop().time() + self._lease
        lost = []
        for delivery in deliveries:
            claim: Claim = delivery.receipt
            if claim.alive and claim.consumer is self:
                claim.until = until
            else:
                lost.append(delivery)
        return lost

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.hub.give_back(claim for claim in self._held if claim.outcome is None)
        self.hub.commits.soon()
        await self._on_close(self)

    def _check_open(self) -> None:
        if self._closed:
            raise consumer_closed(self.hub.name)
        if self.hub.removed:
            raise SubscriptionNotFound(f"subscription {self.hub.name!r} was deleted; declare it again")

    def _refusal(self, delivery: Delivery, batch: dict[Claim, Outcome]) -> SettlementError | None:
        claim: Claim = delivery.receipt
        if claim.consumer is not self:
            return of_another_consumer(delivery.message.id)
        if claim.settled or claim in batch:
            return settled_before(delivery.message.id)
        return None if claim.alive else lease_over(delivery.message.id)

    async def _perform(self, batch: dict[Claim, Outcome]) -> None:
        """Copies first, confirmed; then what is done is committed. May be called again if it raised."""
        copies: list[tuple[Claim, Record, Envelope]] = []
        for claim, outcome in batch.items():
            if claim.copy is None and (made := self._copy(claim, outcome)) is not None:
                copies.append((claim, *made))
        if copies:
            # A zombie must not make a copy of what its successor is doing.
            await self.hub.commits.flush(check=True)
            copies = [copy for copy in copies if copy[0].alive]
            errors = await self._sender.send([record for _, record, _ in copies])
            for (claim, _, envelope), error in zip(copies, errors, strict=True):
                if error is None:
                    claim.copy = envelope
            failed = [error for error in errors if error is not None]
            if failed:
                raise unavailable(f"{self.hub.name}: cannot settle", failed[0])
        for claim, outcome in batch.items():
            if claim.alive and claim.outcome is None:
                claim.outcome = outcome
                self._note(claim, outcome)
        await self.hub.commits.flush()

    def _copy(self, claim: Claim, outcome: Outcome) -> tuple[Record, Envelope] | None:
        item, now, hub = claim.item, self._clock.now(), self.hub
        if isinstance(outcome, Dead):
            told = self._failed(claim, outcome.failure, due=None, suspect=False)
            return letter_record(self._names, hub.name, told, now), told
        if isinstance(outcome, Retry):
            due = now + max(0.0, outcome.delay)
            told = self._failed(claim, outcome.failure, due=due, suspect=outcome.suspect)
            told = wire.changed(told, {"attempt": item.attempt + 1})
        elif isinstance(outcome, Release) and outcome.delay > 0:
            told = item.told(now, due=now + outcome.delay)
        else:
            return None
        if hub.entry.asked.ordered:
            place = (item.part.topic, item.part.number)
            return trial_record(self._names, hub.name, told, place, item.offset), told
        return hub.copy_to_later(told), told

    def _failed(self, claim: Claim, failure: Failure, **changes: object) -> Envelope:
        told = claim.item.told(self._clock.now(), **changes)
        return wire.changed(told, {"history": wire.history([*told.failures(), failure])})

    def _note(self, claim: Claim, outcome: Outcome) -> None:
        item = claim.item
        item.part.dirty = True
        if self._goes_on_here(outcome):
            if claim.copy is not None:
                self.hub.retry_in_place(item, claim.copy, claim.copy.due or 0.0)
            item.part.ledger.give_back(item.offset)
        else:
            item.part.ledger.complete(item.offset)

    def _goes_on_here(self, outcome: Outcome) -> bool:
        if isinstance(outcome, Release) and outcome.delay <= 0:
            return True
        return self.hub.entry.asked.ordered and isinstance(outcome, Retry | Release)

    def _conclude(self, claim: Claim, outcome: Outcome, trials: list[Record]) -> None:
        """It is committed: the message goes on, or the next of its key."""
        item = claim.item
        self._held.discard(claim)
        if self._goes_on_here(outcome):
            self.hub.give_back([claim], ahead=isinstance(outcome, Release))
            return
        self.hub.remove(item)
        if self.hub.entry.asked.ordered and item.envelope.history and isinstance(outcome, Ack | Cancel):
            trials.append(gone_record(self._names, self.hub.name, item.envelope.message))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
