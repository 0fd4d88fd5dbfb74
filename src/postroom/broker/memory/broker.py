"""The broker in memory."""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import ClassVar

from postroom.broker.base import (
    Broker,
    Capabilities,
    Consumer,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.broker.memory.consumer import MemoryConsumer
from postroom.broker.memory.jobs import MemoryJobStore
from postroom.broker.memory.state import Copy, Queue, matches
from postroom.clock import Clock, SystemClock
from postroom.errors import (
    BrokerClosed,
    ConfigurationError,
    IdempotencyConflict,
    PostroomError,
    QueueFull,
    SubscriptionNotFound,
    TopicNotFound,
)
from postroom.message import DeadLetter, JobRecord, JobState, Message


class State:
    """What brokers of one name share. One lock guards it; nothing waits while holding it."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.topics: dict[str, Topic] = {}
        self.queues: dict[str, Queue] = {}
        self.log: list[tuple[float, float, Message]] = []
        """(published at, kept until, message)"""
        self.unwanted: dict[str, tuple[float, JobRecord]] = {}
        """Records of messages that no subscription wanted, with the end of their time."""
        self.keys: dict[tuple[str, str], tuple[str, bytes, float]] = {}
        self.seq = itertools.count(1)
        self.waiters: weakref.WeakSet[MemoryConsumer] = weakref.WeakSet()

    def wake_all(self) -> None:
        for consumer in list(self.waiters):
            consumer.wake()

    def forget_old(self, now: float) -> None:
        for queue in self.queues.values():
            queue.forget_old(now)
        self.log = [item for item in self.log if item[1] > now]
        for place in [place for place, (_, _, until) in self.keys.items() if until <= now]:
            del self.keys[place]
        for job_id in [job_id for job_id, (until, _) in self.unwanted.items() if until <= now]:
            del self.unwanted[job_id]


_shared: dict[str, State] = {}


class MemoryBroker(Broker):
    """``memory://`` is private to the broker; ``memory://name`` is shared within the process."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="none",
        shared=False,
        death_notice=30.0,
        jobs=True,
        transactional_publish=False,
        delay=None,
        priorities=True,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=True,
        expiry=True,
        retention=True,
    )

    def __init__(self, url: str = "memory://", *, clock: Clock | None = None) -> None:
        """``clock`` replaces the machine's clock, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        scheme, _, name = url.partition("://")
        if scheme != "memory" or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise ConfigurationError(f"{url}: write memory:// or memory://name")
        self.clock: Clock = clock or SystemClock()
        self.state = _shared.setdefault(name, State()) if name else State()
        self._consumers: set[MemoryConsumer] = set()
        self._open = False
        self._jobs = MemoryJobStore(self)

    async def connect(self) -> None:
        self._open = True

    async def close(self) -> None:
        for consumer in list(self._consumers):
            await consumer.close()
        self._open = False

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        with self._locked() as state:
            for topic in topics:
                self._declare_topic(state, topic)
            for subscription in subscriptions:
                self._declare_subscription(state, subscription)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        with self._locked() as state:
            state.forget_old(self.clock.now())
            return [self._publish(state, message) for message in messages]

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        consumer = MemoryConsumer(self, self.queue(subscription), lease)
        self._consumers.add(consumer)
        self.state.waiters.add(consumer)
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        now = self.clock.now()
        with self._locked() as state:
            return [
                queue.stats(now, name in state.topics and state.topics[name].queue)
                for name, queue in sorted(state.queues.items())
            ]

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        with self._locked():
            queue = self.queue(subscription)
            dead = queue.dead()
            if ids is not None:
                return [queue.letter(copy) for copy in dead if copy.message.id in set(ids)]
            known = [copy.message.id for copy in dead]
            begin = known.index(after) + 1 if after in known else 0
            return [queue.letter(copy) for copy in dead[begin : begin + limit]]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        with self._locked():
            queue = self.queue(subscription)
            moved = self._dead(queue, ids)
            for copy in moved:
                copy.redriven += 1
                queue.revive(copy, self.clock.now())
            return [copy.message.id for copy in moved]

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        with self._locked():
            queue = self.queue(subscription)
            gone = [copy.message.id for copy in self._dead(queue, ids)]
            for job_id in gone:
                del queue.copies[job_id]
            return gone

    async def purge(self, subscription: str) -> int:
        with self._locked():
            queue = self.queue(subscription)
            waiting = [copy for copy in queue.copies.values() if copy.ended is None and copy.holder is None]
            for copy in waiting:
                queue.end(copy, JobState.CANCELLED, self.clock.now())
            return len(waiting)

    async def unsubscribe(self, subscription: str) -> None:
        with self._locked() as state:
            del state.queues[self.queue(subscription).spec.name]

    async def replay(self, subscription: str, since: float | None = None) -> int:
        now = self.clock.now()
        with self._locked() as state:
            queue = self.queue(subscription)
            count = 0
            for message in self._retained(state, queue.spec, since):
                copy = queue.copies.get(message.id)
                if copy is None:
                    count += queue.add(message, next(state.seq), now)
                elif copy.ended is not None:
                    queue.revive(copy, now)
                    count += 1
            return count

    @property
    def jobs(self) -> MemoryJobStore:
        return self._jobs

    def queue(self, subscription: str) -> Queue:
        """Raises ``SubscriptionNotFound``."""
        queue = self.state.queues.get(subscription)
        if queue is None:
            raise SubscriptionNotFound(f"no queue or subscription {subscription!r}")
        return queue

    def forget(self, consumer: MemoryConsumer) -> None:
        self._consumers.discard(consumer)

    def _locked(self) -> _Locked:
        if not self._open:
            raise BrokerClosed("the broker is not connected")
        return _Locked(self.state)

    def _declare_topic(self, state: State, topic: Topic) -> None:
        known = state.topics.get(topic.name)
        if known is not None and known.queue != topic.queue:
            before = "queue" if known.queue else "topic"
            raise ConfigurationError(f"{topic.name!r} is a {before} on this broker already; choose another name")
        others = [q for q in state.queues.values() if q.spec.pattern == topic.name and q.spec.name != topic.name]
        if topic.queue and others:
            raise ConfigurationError(
                f"{topic.name!r} cannot be a queue: the subscription {others[0].spec.name!r} is on that topic"
            )
        state.topics[topic.name] = topic

    def _declare_subscription(self, state: State, subscription: Subscription) -> None:
        topic = state.topics.get(subscription.pattern)
        if topic is not None and topic.queue and subscription.name != topic.name:
            raise ConfigurationError(
                f"{topic.name!r} is a queue: it has one subscription only, so {subscription.name!r} cannot be one"
            )
        queue = state.queues.get(subscription.name)
        if queue is not None:
            queue.spec = subscription
            return
        queue = state.queues[subscription.name] = Queue(subscription)
        if subscription.start == "earliest":
            for message in self._retained(state, subscription, None):
                queue.add(message, next(state.seq), self.clock.now())

    def _publish(self, state: State, message: Message) -> str | PostroomError:
        now = self.clock.now()
        topic = state.topics.get(message.topic)
        if topic is None:
            return TopicNotFound(f"no topic or queue {message.topic!r} was ever declared on this broker")
        place = (message.topic, message.idempotency_key or "")
        mark = hashlib.sha256(message.name.encode() + b"\0" + message.body).digest()
        if message.idempotency_key is not None and place in state.keys:
            first, fingerprint, _ = state.keys[place]
            if fingerprint == mark:
                return first
            return IdempotencyConflict(
                f"the idempotency key {message.idempotency_key!r} was used before for another {message.topic} message; "
                "use a new key for a new payload"
            )
        wanted = [queue for queue in state.queues.values() if _fits(queue, topic) and queue.wants(message.headers)]
        full = next((queue for queue in wanted if queue.full()), None)
        if full is not None:
            return QueueFull(f"{full.spec.name} holds its maximum of {full.spec.limit} messages; try again later")
        if message.idempotency_key is not None:
            state.keys[place] = (message.id, mark, now + message.dedup_window)
        due = now if message.not_before is None else max(now, message.not_before)
        for queue in wanted:
            queue.add(message, next(state.seq), due)
        if topic.retention > 0:
            state.log.append((now, now + topic.retention, message))
        if not wanted:
            state.unwanted[message.id] = (now + (topic.retention or message.result_ttl), _unwanted(message, now))
        return message.id

    def _retained(self, state: State, spec: Subscription, since: float | None) -> list[Message]:
        now = self.clock.now()
        return [
            message
            for published_at, until, message in state.log
            if until > now
            and (since is None or published_at >= since)
            and matches(spec.pattern, message.topic)
            and all(message.headers.get(name) == value for name, value in spec.where.items())
            and (message.expires_at is None or message.expires_at > now)
        ]

    @staticmethod
    def _dead(queue: Queue, ids: Sequence[str]) -> list[Copy]:
        found = [queue.copies.get(job_id) for job_id in dict.fromkeys(ids)]
        return [copy for copy in found if copy is not None and copy.ended is JobState.DEAD]


class _Locked:
    """The state, under its lock; consumers look again afterwards."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __enter__(self) -> State:
        self._state.mutex.acquire()
        return self._state

    def __exit__(self, *_: object) -> None:
        self._state.mutex.release()
        self._state.wake_all()


def _fits(queue: Queue, topic: Topic) -> bool:
    return queue.spec.pattern == topic.name if topic.queue else matches(queue.spec.pattern, topic.name)


def _unwanted(message: Message, now: float) -> JobRecord:
    return JobRecord(
        id=message.id,
        subscription="",
        topic=message.topic,
        name=message.name,
        state=JobState.SUCCEEDED,
        attempt=1,
        created_at=message.created_at,
        finished_at=now,
    )
