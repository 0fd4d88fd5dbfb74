"""A store beside a broker that keeps no job status: together they are a broker that does.

Broker and store cannot change in one step, so their order decides what a crash between two steps leaves behind:

* publish: the store first. A crash leaves a record that nobody was promised; never an accepted id without one.
* an end (ack, dead letter, cancel): the store first. A crash leaves a message that is delivered once more, and
  that the store knows to have ended: the handler does not run again.
* a retry: the store first. A crash leaves a failure that is noted, and a message that comes back when its lease ends;
  a retry without a delay may run before its failure could be noted otherwise.
* a release: the broker first. A crash leaves a record that says running for a while.

Each publish marks its copy in a header, so that the second copy left by an uncertain publish is known as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from postroom.broker.base import (
    Ack,
    Broker,
    Cancel,
    Capabilities,
    Consumer,
    Dead,
    Delivery,
    Outcome,
    Release,
    Retry,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import AlreadySettled, BrokerClosed, LeaseLost, PostroomError, SettlementError
from postroom.message import DeadLetter, Message
from postroom.store.base import Admission, Again, Buried, Cancelled, Claim, Done, End, JobStore, Store

COPY = "postroom-copy"
"""The header that tells the copies of one message apart; taken off before anybody sees the message."""


class Receipt(msgspec.Struct, eq=False):
    """What a delivery carries for its consumer and its store."""

    inner: Delivery
    claim: Claim
    lost: bool = False
    settled: bool = False

    @property
    def token(self) -> str:
        return self.claim.token


class StoredBroker(Broker):
    """``broker`` with the job status, results and idempotency keys of ``store``."""

    def __init__(self, broker: Broker, store: Store, *, clock: Clock | None = None) -> None:
        self._broker = broker
        self._store = store
        self._clock: Clock = clock or SystemClock()
        # Unique among all processes, so that no two copies or holders are ever taken for one.
        self._name = uuid4().hex
        self._count = 0

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return msgspec.structs.replace(
            self._broker.capabilities, jobs=True, deduplication=True, unique=self._store.unique, known_ids=True
        )

    @property
    def jobs(self) -> JobStore:
        return self._store.jobs

    def next_name(self) -> str:
        """A name no process has given before."""
        self._count += 1
        return f"{self._name}-{self._count}"

    async def connect(self) -> None:
        await self._store.connect()
        try:
            await self._broker.connect()
        except BaseException:
            await self._store.close()
            raise

    async def close(self) -> None:
        try:
            await self._broker.close()
        finally:
            await self._store.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await self._broker.declare(topics, subscriptions)
        await self._store.declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        admissions = await self._store.admit(messages)
        answers: list[str | PostroomError] = [
            admission.id if isinstance(admission, Admission) else admission for admission in admissions
        ]
        fresh: dict[str, Message] = {}
        replaced: dict[str, str] = {}
        for message, admission in zip(messages, admissions, strict=True):
            if isinstance(admission, Admission) and admission.publish:
                fresh.setdefault(admission.id, self._marked(message, admission.id))
                if admission.replaces is not None:
                    replaced[admission.id] = admission.replaces
        if not fresh:
            return answers
        told = dict(zip(fresh, await self._broker.publish(list(fresh.values())), strict=True))
        stored = [job_id for job_id, answer in told.items() if isinstance(answer, str)]
        if stored:
            await self._store.confirm(stored)
            over = [replaced[job_id] for job_id in stored if job_id in replaced]
            if over:
                # Only now may they go: a crash before it leaves both, never neither.
                await self._store.replaced(over)
        if len(stored) < len(told):
            await self._store.withdraw([job_id for job_id in told if job_id not in stored])
        return [told.get(answer, answer) if isinstance(answer, str) else answer for answer in answers]

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        return _StoredConsumer(self, await self._broker.consume(subscription, lease=lease), self._store)

    async def stats(self) -> list[SubscriptionStats]:
        return await self._broker.stats()

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        letters = await self._broker.dead_letters(subscription, ids=ids, after=after, limit=limit)
        return [msgspec.structs.replace(letter, message=unmarked(letter.message)[0]) for letter in letters]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        await self._store.redriving(subscription, ids)
        moved = await self._broker.redrive(subscription, ids)
        await self._store.redriven(subscription, moved)
        return moved

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        gone = await self._broker.discard(subscription, ids)
        await self._store.discarded(subscription, gone)
        return gone

    async def purge(self, subscription: str) -> int:
        before = self._clock.now()
        count = await self._broker.purge(subscription)
        await self._store.purged(subscription, before)
        return count

    async def unsubscribe(self, subscription: str) -> None:
        await self._broker.unsubscribe(subscription)
        await self._store.unsubscribed(subscription)

    async def replay(self, subscription: str, since: float | None = None) -> int:
        return await self._broker.replay(subscription, since)

    def joins(self, connection: Any) -> bool:
        return self._broker.joins(connection)

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return self._broker.publish_in(connection, messages)

    async def apublish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await self._broker.apublish_in(connection, messages)

    async def plan(self) -> list[str]:
        return [*await self._broker.plan(), *await self._store.plan()]

    async def migrate(self) -> None:
        await self._broker.migrate()
        await self._store.migrate()

    async def examine(self) -> list[Finding]:
        beside = [msgspec.structs.replace(item, title=f"store: {item.title}") for item in await self._store.examine()]
        return [*await self._broker.examine(), *beside]

    def _marked(self, message: Message, job_id: str) -> Message:
        headers = {**message.headers, COPY: self.next_name()}
        return msgspec.structs.replace(message, id=job_id, headers=headers)


class _StoredConsumer(Consumer):
    def __init__(self, broker: StoredBroker, consumer: Consumer, store: Store) -> None:
        self._broker = broker
        self._consumer = consumer
        self._store = store
        self._closed = False

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - loop.time())
            found = await self._consumer.receive(max_messages, left)
            if not found:
                return []
            accepting = asyncio.ensure_future(self._accept(found))
            try:
                accepted = await asyncio.shield(accepting)
            except asyncio.CancelledError:
                # What was leased must not stay with nobody until the lease ends.
                for delivery in await accepting:
                    delivery.receipt.settled = True
                    await self._consumer.settle([(delivery.receipt.inner, Release())])
                raise
            if accepted:
                return accepted

    def started(self, deliveries: Sequence[Delivery]) -> None:
        self._consumer.started([delivery.receipt.inner for delivery in deliveries])

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        if self._closed:
            raise BrokerClosed("the consumer is closed")
        receipts: list[Receipt] = [delivery.receipt for delivery, _ in settlements]
        errors: dict[int, SettlementError | None] = {}
        for index, receipt in enumerate(receipts):
            if (refusal := _refusal(receipt)) is not None:
                errors[index] = refusal
            # Until the broker has answered, the same delivery later in the batch is a second settlement.
            receipt.settled = True
        chosen = {n: (receipts[n], outcome) for n, (_, outcome) in enumerate(settlements) if n not in errors}
        try:
            errors |= await self._perform(chosen)
        except BaseException:
            for receipt, _ in chosen.values():
                receipt.settled = False
            raise
        return [errors[index] for index in range(len(settlements))]

    async def _perform(self, chosen: Mapping[int, tuple[Receipt, Outcome]]) -> dict[int, SettlementError | None]:
        """In the order that a crash between two steps can be lived with."""
        errors = await self._finish(chosen)
        going = {index: item for index, item in chosen.items() if index not in errors}
        await self._again(going.values(), Retry)
        told = await self._consumer.settle([(receipt.inner, outcome) for receipt, outcome in going.values()])
        errors |= dict(zip(going, told, strict=True))
        for index, error in errors.items():
            chosen[index][0].lost = isinstance(error, LeaseLost)
        await self._follow([going[index] for index in going if errors[index] is None])
        return errors

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        by_inner = {delivery.receipt.inner: delivery for delivery in deliveries}
        return [by_inner[lost] for lost in await self._consumer.extend(list(by_inner))]

    async def close(self) -> None:
        self._closed = True
        await self._consumer.close()

    async def _accept(self, found: Sequence[Delivery]) -> list[Delivery]:
        """Those that are to run; the others are settled as the store says."""
        receipts = [Receipt(delivery, self._claim(delivery)) for delivery in found]
        try:
            verdicts = await self._store.deliver([receipt.claim for receipt in receipts])
        except BaseException:
            await self._consumer.settle([(delivery, Release()) for delivery in found])
            raise
        over = [(receipt, end) for receipt, end in zip(receipts, verdicts, strict=True) if end is not None]
        if over:
            await self._consumer.settle([(receipt.inner, _outcome(end)) for receipt, end in over])
            await self._store.buried([receipt.claim for receipt, end in over if isinstance(end, Buried)])
        return [_delivery(receipt) for receipt, end in zip(receipts, verdicts, strict=True) if end is None]

    async def _finish(self, chosen: Mapping[int, tuple[Receipt, Outcome]]) -> dict[int, SettlementError | None]:
        """Tell the store how these end; the errors of those that are no longer ours."""
        ends = [(index, receipt, _end(outcome)) for index, (receipt, outcome) in chosen.items()]
        final = [(index, receipt, end) for index, receipt, end in ends if end is not None]
        ours = await self._store.finish([(receipt.claim, end) for _, receipt, end in final]) if final else []
        return {
            index: LeaseLost(f"{receipt.claim.message.id} has passed to another")
            for (index, receipt, _), mine in zip(final, ours, strict=True)
            if not mine
        }

    async def _follow(self, settled: Sequence[tuple[Receipt, Outcome]]) -> None:
        """Tell the store what the broker has done."""
        await self._again(settled, Release)
        buried = [receipt.claim for receipt, outcome in settled if isinstance(outcome, Dead)]
        if buried:
            await self._store.buried(buried)

    async def _again(self, items: Iterable[tuple[Receipt, Outcome]], kind: type[Retry | Release]) -> None:
        """Tell the store which of these wait again by an outcome of that kind."""
        back = [
            (receipt.claim, Again(outcome.delay, outcome.failure if isinstance(outcome, Retry) else None))
            for receipt, outcome in items
            if isinstance(outcome, Retry | Release) and isinstance(outcome, kind)
        ]
        if back:
            await self._store.again(back)

    def _claim(self, delivery: Delivery) -> Claim:
        message, copy = unmarked(delivery.message)
        return Claim(
            message=message,
            subscription=delivery.subscription,
            attempt=delivery.attempt,
            suspect=delivery.suspect,
            token=self._broker.next_name(),
            copy=copy,
            replayed=delivery.replayed,
        )


def unmarked(message: Message) -> tuple[Message, str]:
    """The message as it was published, and which copy of it this is."""
    copy = message.headers.get(COPY)
    if copy is None:
        return message, ""
    headers = {name: value for name, value in message.headers.items() if name != COPY}
    return msgspec.structs.replace(message, headers=headers), copy


def _refusal(receipt: Receipt) -> SettlementError | None:
    if receipt.lost:
        return LeaseLost(f"{receipt.claim.message.id} has passed to another")
    return AlreadySettled(f"{receipt.claim.message.id} was settled before") if receipt.settled else None


def _delivery(receipt: Receipt) -> Delivery:
    return msgspec.structs.replace(receipt.inner, message=receipt.claim.message, receipt=receipt)


def _end(outcome: Outcome) -> End | None:
    if isinstance(outcome, Ack):
        return Done(outcome.result)
    if isinstance(outcome, Dead):
        return Buried(outcome.failure)
    return Cancelled() if isinstance(outcome, Cancel) else None


def _outcome(end: End) -> Outcome:
    if isinstance(end, Buried):
        return Dead(end.failure)
    return Cancel() if isinstance(end, Cancelled) else Ack()
