"""The RabbitMQ broker itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from postroom.broker.amqp import doctor, history, ladder, topology, wire
from postroom.broker.amqp.address import parse
from postroom.broker.amqp.confirms import Answer, Post, Publisher
from postroom.broker.amqp.consumer import AMQPConsumer
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.letters import Letters
from postroom.broker.amqp.link import NOT_FOUND, Link, Refused
from postroom.broker.amqp.office import Office, gone
from postroom.broker.amqp.ordered import OrderedConsumer
from postroom.broker.amqp.topology import PRIORITIES_SINCE, Directory, version_of
from postroom.broker.base import PRIORITIES, Broker, Capabilities, Consumer, Subscription, SubscriptionStats, Topic
from postroom.broker.demands import check_topology
from postroom.broker.routing import matches
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EncodeError,
    MessageTooLarge,
    PostroomError,
    QueueFull,
    SubscriptionNotFound,
    TopicNotFound,
    UnsupportedOperation,
)
from postroom.message import DeadLetter, Message

_BATCH = 500


class AMQPBroker(Broker):
    """RabbitMQ 3.10 or newer: quorum queues, publisher confirms, topic and headers exchanges.

    ``amqp://user:password@host:5672/vhost``, ``amqps://`` for TLS; several hosts, with commas, are the nodes of a
    cluster. Options: ``namespace`` (how every name on the server begins, ``postroom``), ``heartbeat`` (seconds, 10);
    for TLS ``cafile``, ``certfile``, ``keyfile``. Jobs have priorities since 4.3, which shows in ``capabilities`` once
    it is connected.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="fsync",
        shared=True,
        death_notice=1.0,
        jobs=False,
        transactional_publish=False,
        delay=None,
        priorities=frozenset(),
        fifo=False,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=False,
        known_ids=False,
        start_notes=False,
        expiry=True,
        limits=False,
        exact_stats=False,
        retention=True,
        max_message_size=wire.MAX_BODY,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """Raises ``ConfigurationError``. ``clock``: for due times and expiry; the server has its own for delays."""
        self._address = parse(url)
        self._clock: Clock = clock or SystemClock()
        self._opened = False
        self._closed = False
        self._consumers: set[AMQPConsumer] = set()

    # The broker contract

    async def connect(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._opened:
            return
        # A server short of memory stops reading from those that publish: acks and leases go another way.
        self._reading, writing = Link(self._address, "consume"), Link(self._address, "publish")
        self._links = (self._reading, writing)
        self._publisher = Publisher(writing, self._until_streams_are_up)
        self._directory = Directory(self._reading, self._publisher, self._address)
        self._office = Office(self._reading, self._publisher, self._address, self._clock)
        self._letters = Letters(self._reading, self._publisher, self._address, self._clock)
        self._opened = True
        try:
            await self._directory.refresh()
        except BaseException:
            self._opened = False
            await asyncio.gather(*(link.close() for link in self._links))
            raise
        if version_of(self._reading.server) >= PRIORITIES_SINCE:
            # Of the class it is what every supported server can do.
            self.capabilities = msgspec.structs.replace(self.capabilities, priorities=PRIORITIES)  # type: ignore[misc]

    async def close(self) -> None:
        if self._closed:
            return
        for consumer in list(self._consumers):
            await consumer.close()
        self._closed = True
        if self._opened:
            await asyncio.gather(*(link.close() for link in self._links))

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        self._check()
        check_topology(self.capabilities, topics, subscriptions)
        if await self._directory.has(topics, subscriptions):
            # Whenever a worker starts once more: many that start at once must not wait for each other, and what
            # somebody has deleted from the server is there again.
            await self._directory.build(self._directory.known, topics, subscriptions)
            return
        async with self._directory.changing() as state:
            topology.check(state, topics, subscriptions)
            await self._directory.build(state, topics, subscriptions)
            late = [one for one in subscriptions if one.start == "earliest" and one.name not in state.subscriptions]
            state.topics.update((topic.name, topic) for topic in topics)
            state.subscriptions.update((subscription.name, subscription) for subscription in subscriptions)
            for subscription in late:
                # Not remembered before it has the history: after a death on the way it begins again, and doubles some.
                await self._repeat(subscription, state.topics, None, replayed=False)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        self._check()
        answers: list[str | PostroomError] = []
        posts: dict[int, Post] = {}
        now = self._clock.now()
        for index, message in enumerate(messages):
            answers.append(message.id)
            try:
                posts[index] = await self._post(message, now)
            except (EncodeError, MessageTooLarge, TopicNotFound, UnsupportedOperation) as error:
                answers[index] = error
        try:
            told = await self._publisher.send(list(posts.values()))
        except BrokerUnavailable:
            self._check()
            raise
        for index, answer in zip(posts, told, strict=True):
            failure = self._told(messages[index], answer)
            if failure is not None:
                answers[index] = failure
            elif posts[index].exchange not in ("", self._address.events):
                self._note_delayed(messages[index])
        return answers

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        if lease <= 0:
            raise ConfigurationError(f"consume: lease must be more than 0 seconds, not {lease}")
        self._check()
        found = await self._directory.subscription(subscription)
        kind = OrderedConsumer if found.ordered else AMQPConsumer
        consumer = kind(self._office, subscription, lease, self._consumers.discard)
        self._consumers.add(consumer)
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        self._check()
        state = await self._directory.refresh()
        names = sorted(state.subscriptions)
        queues = [queue for name in names for queue in (self._address.queue(name), self._address.dead(name))]
        depths = await self._depths(queues)
        return [self._count(state.subscriptions[name], state.is_queue(name), depths) for name in names]

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        self._check()
        await self._directory.subscription(subscription)
        return await self._letters.page(subscription, ids, after, limit)

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        self._check()
        await self._directory.subscription(subscription)
        return await self._letters.redrive(subscription, ids) if ids else []

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        self._check()
        await self._directory.subscription(subscription)
        return await self._letters.discard(subscription, ids) if ids else []

    async def purge(self, subscription: str) -> int:
        self._check()
        await self._directory.subscription(subscription)
        channel = await self._reading.channel()
        try:
            purged = await channel.call("queue_purge", queue=self._address.queue(subscription))
        except Refused as error:
            raise gone(subscription, error) from error
        finally:
            await channel.close()
        here = sum(consumer.purge() for consumer in self._consumers if consumer.name == subscription)
        return int(purged.method.message_count) + here

    async def unsubscribe(self, subscription: str) -> None:
        self._check()
        async with self._directory.changing() as state:
            found = state.subscriptions.get(subscription)
            if found is None:
                raise SubscriptionNotFound(f"no subscription {subscription!r} is known to the broker")
            await self._directory.remove(found, state.is_queue(subscription))
            del state.subscriptions[subscription]
            if state.is_queue(subscription):
                # Without its subscription it would accept jobs and drop them.
                del state.topics[subscription]
        self._office.forget(subscription)

    async def replay(self, subscription: str, since: float | None = None) -> int:
        self._check()
        found = await self._directory.subscription(subscription)
        return await self._repeat(found, self._directory.known.topics, since, replayed=True)

    async def examine(self) -> list[Finding]:
        if not self._opened or self._closed:
            return []
        state = await self._directory.refresh()
        return await doctor.examine(self._reading, self._publisher, self._address, state)

    # Publishing

    async def _until_streams_are_up(self) -> None:
        streams = [
            self._address.history(topic.name) for topic in self._directory.known.topics.values() if topic.retention
        ]
        await history.until_up(self._reading, streams)

    async def _post(self, message: Message, now: float) -> Post:
        largest = self._publisher.largest or wire.MAX_BODY
        if len(message.body) > largest:
            raise MessageTooLarge(
                f"message {message.id} has {len(message.body):,} bytes; RabbitMQ takes {largest:,}; "
                "pass a reference to the data"
            )
        topic = self._directory.known.topics.get(message.topic) or await self._directory.topic(message.topic)
        if topic is None:
            raise TopicNotFound(f"no queue or topic {message.topic!r} is known to the broker; declare it first")
        delay = 0.0 if message.not_before is None else message.not_before - now
        is_ordered = topic.queue and self._directory.known.subscriptions[topic.name].ordered
        if message.priority and (is_ordered or not (topic.queue and self.capabilities.priorities)):
            raise self._no_priority(message, topic)
        # Where there is an order it has its place now, and waits there for its time.
        due = message.not_before if delay > ladder.LONGEST or (is_ordered and delay > 0) else None
        properties = wire.properties_of(Copy(message=message, due=due))
        wire.check_size(message, properties)
        if delay > 0 and not is_ordered:
            to = ladder.to_queue(topic.name) if topic.queue else ladder.to_topic(topic.name)
            return Post(*ladder.way(self._address, delay, to), properties, message.body)
        if topic.queue:
            return Post("", self._address.queue(topic.name), properties, message.body)
        return Post(self._address.events, topic.name, properties, message.body)

    def _no_priority(self, message: Message, topic: Topic) -> UnsupportedOperation:
        if not self.capabilities.priorities:
            version = self._reading.server.get("version", "older")
            reason = f"RabbitMQ has priorities for quorum queues since 4.3, and this is {version}"
        elif topic.queue:
            reason = f"{topic.name!r} is ordered, and RabbitMQ would let it overtake its key"
        else:
            reason = f"{topic.name!r} is a topic, and in its ordered subscriptions it would overtake its key"
        return UnsupportedOperation(f"priority={message.priority}: {reason}; leave it out", "priorities")

    def _told(self, message: Message, answer: Answer) -> PostroomError | None:
        if answer == "refused":
            return QueueFull(f"RabbitMQ refused {message.id}: a queue of {message.topic!r} is full or has no majority")
        if answer == "unknown":
            return BrokerUnavailable(f"{message.id} was not confirmed: the connection was lost; publish it again")
        if answer == "unrouted" and self._directory.known.is_queue(message.topic):
            # Deleted behind our back; an event that nobody wants, though, is accepted.
            return TopicNotFound(f"queue {message.topic!r} is gone from the server; declare it again")
        return None

    async def _repeat(
        self, subscription: Subscription, topics: Mapping[str, Topic], since: float | None, *, replayed: bool
    ) -> int:
        """Copy what is retained of the wanted topics into the subscription. Returns how many."""
        count = 0
        for topic in topics.values():
            if not topic.retention or not matches(subscription.pattern, topic.name):
                continue
            now = self._clock.now()
            start = max(now - topic.retention, since or 0.0)
            if start > now:
                continue
            batch: list[tuple[Copy, float]] = []
            stream = self._address.history(topic.name)
            async for copy in history.read(self._reading, self._publisher, stream, topic.name, start):
                headers = copy.message.headers
                if all(headers.get(name) == value for name, value in subscription.where.items()):
                    batch.append((msgspec.structs.replace(copy, replayed=replayed, deaths=0), 0.0))
                if len(batch) == _BATCH:
                    count += await self._store_all(subscription.name, batch)
                    batch = []
            count += await self._store_all(subscription.name, batch)
        return count

    async def _store_all(self, subscription: str, batch: list[tuple[Copy, float]]) -> int:
        answers = await self._office.put(subscription, batch)
        if any(answer != "stored" for answer in answers):
            raise BrokerUnavailable(f"{subscription!r} did not take all of its history; repeat it")
        return len(batch)

    # Counting

    def _count(self, subscription: Subscription, is_queue: bool, depths: Mapping[str, int]) -> SubscriptionStats:
        name = subscription.name
        consumers = [consumer for consumer in self._consumers if consumer.name == name]
        return SubscriptionStats(
            name=name,
            pattern=subscription.pattern,
            queue=is_queue,
            ready=depths.get(self._address.queue(name), 0) + sum(consumer.waiting for consumer in consumers),
            delayed=self._office.count_delayed(name) + sum(consumer.delayed for consumer in consumers),
            running=sum(consumer.running for consumer in consumers),
            dead=depths.get(self._address.dead(name), 0),
            oldest=None,
        )

    async def _depths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages are ready in each; what does not exist is left out."""
        depths: dict[str, int] = {}
        channel = await self._reading.channel()
        for queue in queues:
            try:
                declared = await channel.call("queue_declare", queue=queue, passive=True)
                depths[queue] = int(declared.method.message_count)
            except Refused as error:
                if error.code != NOT_FOUND:
                    raise
                channel = await self._reading.channel()
        await channel.close()
        return depths

    def _note_delayed(self, message: Message) -> None:
        state = self._directory.known
        names = (
            [message.topic]
            if state.is_queue(message.topic)
            else [subscription.name for subscription in state.wanting(message.topic)]
        )
        for name in names:
            self._office.note_delayed(name, message.not_before or 0.0)

    def _check(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if not self._opened:
            raise BrokerClosed("the broker is not connected; await connect() first")
