"""What a conformance test is given: a connected broker, and words for what it does with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from types import TracebackType
from typing import Any

from postroom.broker.base import (
    Ack,
    Broker,
    Cancel,
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
from postroom.errors import PostroomError, SettlementError
from postroom.message import DeadLetter, Failure, FailureReason, JobRecord, Message, new_id
from postroom.testing.harness import Harness
from postroom.testing.history import Event, History, Operation

_OPERATIONS: dict[type[Any], Operation] = {
    Ack: "ack",
    Retry: "retry",
    Release: "release",
    Dead: "dead",
    Cancel: "cancel",
}


def labels(messages: Sequence[Message | Delivery | DeadLetter]) -> list[str]:
    """The bodies as text: what the tests compare, so that a failure can be read."""
    return [(item if isinstance(item, Message) else item.message).body.decode() for item in messages]


def failure(attempt: int = 1, reason: FailureReason = "error", text: str = "it broke") -> Failure:
    """A failure with every field set."""
    return Failure(
        attempt=attempt,
        reason=reason,
        error="ValueError",
        message=text,
        traceback="Traceback (most recent call last): …",
        worker="host:1",
        started_at=1_750_000_000.25,
        failed_at=1_750_000_001.5,
    )


class Scene:
    """An async context manager: one test on one fresh storage. Everything it does is in ``history``."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.unit = harness.unit
        self.lease = harness.lease
        self.history = History()
        self._brokers: list[Broker] = []
        self._names = 0
        self._consumers: dict[Consumer, str] = {}
        self._run = new_id()[-12:]
        self._slowest = 0.0

    async def __aenter__(self) -> Scene:
        await self.harness.start()
        self.broker = await self.another_broker()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close_brokers()
        await self.harness.stop()

    async def another_broker(self) -> Broker:
        """One more connected broker on the same storage."""
        broker = self.harness.make_broker()
        await broker.connect()
        self._brokers.append(broker)
        return broker

    async def close_brokers(self) -> None:
        for broker in self._brokers:
            await broker.close()
        self._brokers.clear()

    async def restart(self) -> None:
        """Close all brokers, restart the server, and connect anew."""
        await self.close_brokers()
        await self.harness.restart()
        self.broker = await self.another_broker()

    # Time

    @property
    def was_too_slow(self) -> bool:
        """One step took so long, on a real clock, that what is due after a ``unit`` may have come before the next."""
        return self.harness.clock is None and self._slowest > self.unit / 8

    @contextmanager
    def _step(self, wait: float = 0.0) -> Iterator[None]:
        """What should take no time, but for the seconds it may wait."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._slowest = max(self._slowest, time.monotonic() - begin - wait)

    def now(self) -> float:
        return self.harness.clock.now() if self.harness.clock is not None else time.time()

    async def pass_time(self, seconds: float) -> None:
        """Afterwards what was due within ``seconds`` has happened."""
        if self.harness.clock is not None:
            await self.harness.clock.advance(seconds)
        else:
            with self._step(seconds + self.harness.slack):
                await asyncio.sleep(seconds + self.harness.slack)

    async def settle(self) -> None:
        """Let what was started get as far as it can."""
        if self.harness.clock is not None:
            await self.harness.clock.settle()
        else:
            await asyncio.sleep(self.harness.unit / 4)

    # Topology

    def name(self, kind: str) -> str:
        """A name no other test uses."""
        self._names += 1
        return f"{kind}-{self._run}-{self._names}"

    async def queue(self, **options: Any) -> str:
        name = self.name("queue")
        subscription = Subscription(name=name, pattern=name, **options)
        await self.broker.declare([Topic(name=name, queue=True)], [subscription])
        return name

    async def topic(self, name: str | None = None, *, retention: float = 0.0) -> str:
        name = name or self.name("topic")
        await self.broker.declare([Topic(name=name, retention=retention)], [])
        return name

    async def subscribe(self, pattern: str, **options: Any) -> str:
        name = self.name("subscription")
        await self.broker.declare([], [Subscription(name=name, pattern=pattern, **options)])
        return name

    # In

    def message(self, topic: str, label: str = "m", **options: Any) -> Message:
        """``label`` is its body."""
        made: dict[str, Any] = {"id": new_id(), "topic": topic, "name": "work", "created_at": self.now()}
        return Message(**(made | {"body": label.encode()} | options))

    def messages(self, topic: str, wanted: str, **options: Any) -> list[Message]:
        """One message for each word of ``wanted``."""
        return [self.message(topic, label, **options) for label in wanted.split()]

    async def publish(self, *messages: Message, broker: Broker | None = None) -> list[str]:
        """Publish; each must be accepted. Returns the ids."""
        for message in messages:
            self._note_publish(message, "invoke")
        with self._step():
            answers = await (broker or self.broker).publish(messages)
        assert len(answers) == len(messages), "publish must answer for each message"
        ids = []
        for message, answer in zip(messages, answers, strict=True):
            assert isinstance(answer, str), f"publish refused {message.body[:40]!r}: {answer!r}"
            self._note_publish(message, "ok")
            ids.append(answer)
        return ids

    async def refused(self, message: Message) -> PostroomError:
        """Publish; it must be refused. Returns the error."""
        (answer,) = await self.broker.publish([message])
        assert isinstance(answer, PostroomError), f"publish accepted {message!r:.200}"
        return answer

    # Out

    async def consume(self, subscription: str, *, lease: float | None = None, broker: Broker | None = None) -> Consumer:
        consumer = await (broker or self.broker).consume(subscription, lease=lease or self.lease)
        self._consumers[consumer] = f"consumer {len(self._consumers) + 1}"
        return consumer

    async def receive(self, consumer: Consumer, count: int, *, wait: bool = True) -> list[Delivery]:
        """One ``receive``. With a manual clock it never waits: what is there is there at once."""
        seconds = self.harness.patience if wait else self.harness.unit / 4
        with self._step(seconds):
            deliveries = await consumer.receive(count, 0.0 if self.harness.clock is not None else seconds)
        assert len(deliveries) <= count, f"asked for {count}, got {len(deliveries)}"
        ids = [delivery.message.id for delivery in deliveries]
        assert len(ids) == len(set(ids)), f"one receive gave a message twice: {labels(deliveries)}"
        for delivery in deliveries:
            self._note(consumer, delivery, "deliver", until=self.now() + self.lease)
        return deliveries

    async def take(self, consumer: Consumer, count: int = 1) -> list[Delivery]:
        """Exactly ``count`` deliveries; fails if they do not come."""
        taken: list[Delivery] = []
        while len(taken) < count:
            more = await self.receive(consumer, count - len(taken))
            assert more, f"{count} deliveries should have come, these did: {labels(taken)}"
            taken += more
        return taken

    async def take_one(self, consumer: Consumer) -> Delivery:
        (delivery,) = await self.take(consumer)
        return delivery

    async def nothing(self, consumer: Consumer) -> None:
        """Fails if anything comes."""
        found = await self.receive(consumer, 10, wait=False)
        assert not found, f"nothing should have come, these did: {labels(found)}"

    async def try_settle(self, consumer: Consumer, delivery: Delivery, outcome: Outcome) -> SettlementError | None:
        with self._step():
            (error,) = await consumer.settle([(delivery, outcome)])
        self._note(consumer, delivery, _OPERATIONS[type(outcome)], "ok" if error is None else "fail")
        return error

    async def do(self, consumer: Consumer, outcome: Outcome, *deliveries: Delivery) -> None:
        """Settle all with ``outcome``; each must be confirmed."""
        with self._step():
            errors = await consumer.settle([(delivery, outcome) for delivery in deliveries])
        assert errors == [None] * len(deliveries), f"settle refused: {errors}"
        for delivery in deliveries:
            self._note(consumer, delivery, _OPERATIONS[type(outcome)])

    async def ack(self, consumer: Consumer, *deliveries: Delivery) -> None:
        await self.do(consumer, Ack(), *deliveries)

    async def fail(self, consumer: Consumer, delivery: Delivery, delay: float = 0.0) -> None:
        await self.do(consumer, Retry(delay=delay, failure=failure(delivery.attempt)), delivery)

    async def kill(self, consumer: Consumer, *, started: Sequence[Delivery] = ()) -> None:
        """As if the holder froze, having started some: its leases run out."""
        if started:
            consumer.started(started)
        await self.pass_time(self.lease + self.harness.slack + self.unit / 10)

    async def drain(self, *consumers: Consumer, count: int) -> list[Delivery]:
        """Consumers side by side, acking whatever comes, until ``count`` were acked or none came for long."""
        drained: list[Delivery] = []
        deadline = time.monotonic() + 4 * self.harness.patience

        async def work(consumer: Consumer) -> None:
            nonlocal deadline
            while len(drained) < count and time.monotonic() < deadline:
                deliveries = await self.receive(consumer, 7, wait=False)
                await self.ack(consumer, *deliveries)
                drained.extend(deliveries)
                if deliveries:
                    deadline = time.monotonic() + 4 * self.harness.patience
                await asyncio.sleep(0)

        await asyncio.gather(*(work(consumer) for consumer in consumers))
        return drained

    async def bury(self, subscription: str, *messages: Message) -> None:
        """Publish and dead-letter, in this order."""
        consumer = await self.consume(subscription)
        for message in messages:
            await self.publish(message)
            await self.do(consumer, Dead(failure()), await self.take_one(consumer))
        await consumer.close()

    # Seen from outside

    async def stats(self, subscription: str) -> SubscriptionStats:
        with self._step():
            (found,) = [stats for stats in await self.broker.stats() if stats.name == subscription]
        return found

    async def counts(self, subscription: str) -> Mapping[str, int]:
        """ready, delayed, running, dead: only those that are not 0."""
        if not self.harness.capabilities.exact_stats:
            # Estimates are right when all is quiet.
            await self.settle()
        stats = await self.stats(subscription)
        return {name: count for name in ("ready", "delayed", "running", "dead") if (count := getattr(stats, name))}

    async def record(self, message_id: str) -> JobRecord:
        (found,) = await self.broker.jobs.get(message_id)
        return found

    def _note_publish(self, message: Message, outcome: Any) -> None:
        event = Event(
            t=self.now(), op="publish", id=message.id, key=message.key, outcome=outcome, digest=_digest(message)
        )
        self.history.note(event)

    def _note(
        self,
        consumer: Consumer,
        delivery: Delivery,
        op: Operation,
        outcome: Any = "ok",
        *,
        until: float | None = None,
    ) -> None:
        self.history.note(
            Event(
                t=self.now(),
                op=op,
                id=delivery.message.id,
                sub=delivery.subscription,
                attempt=delivery.attempt,
                consumer=self._consumers[consumer],
                outcome=outcome,
                until=until,
                key=delivery.message.key,
                digest=_digest(delivery.message) if op == "deliver" else "",
            )
        )


def _digest(message: Message) -> str:
    parts = [message.body, *(f"\0{name}\0{value}".encode() for name, value in sorted(message.headers.items()))]
    return sha256(b"".join(parts)).hexdigest()
