"""What is declared on the server, as this process knows it: which subscriptions a message goes to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.redis.link import Link, Stale
from postroom.broker.redis.records import escape
from postroom.broker.routing import matches, wants
from postroom.errors import ConfigurationError, SubscriptionNotFound
from postroom.message import Message

_topic = msgspec.json.Decoder(Topic)
_subscription = msgspec.json.Decoder(Subscription)
T = TypeVar("T")


class Known(NamedTuple):
    """The topology at one moment. Scripts refuse what was made for another version."""

    version: str
    topics: dict[str, Topic]
    subscriptions: dict[str, Subscription]
    filling: frozenset[str]
    """Subscriptions that have yet to be given what was retained before them."""
    routes: dict[str, list[Subscription]]
    """By topic, as they were asked for."""

    def is_queue(self, name: str) -> bool:
        return name in self.topics and self.topics[name].queue

    def wanting(self, message: Message) -> list[Subscription]:
        routes = self.routes.get(message.topic)
        if routes is None:
            routes = self.routes[message.topic] = self._routes(message.topic)
        return [item for item in routes if not item.where or wants(item, message)]

    def _routes(self, topic: str) -> list[Subscription]:
        if self.is_queue(topic):
            return [self.subscriptions[topic]]
        # A queue's subscription may have the shape of a pattern that fits: it is for the queue alone.
        return [
            item
            for item in self.subscriptions.values()
            if not self.is_queue(item.name) and matches(item.pattern, topic)
        ]

    def sources(self, subscription: Subscription) -> list[Topic]:
        """The topics that retain something for it."""
        return [
            topic
            for topic in self.topics.values()
            if topic.retention > 0
            and (topic.name == subscription.name if topic.queue else matches(subscription.pattern, topic.name))
        ]


class Topology:
    """Reads it when needed, and again when a script says that it has changed."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._known: Known | None = None

    async def known(self) -> Known:
        if self._known is None:
            with self._link.using() as client:
                self._known = _decoded(await client.hgetall(self._link.key("topology")))
        return self._known

    async def read(self) -> Known:
        """As it stands now."""
        self._known = None
        return await self.known()

    async def using(self, use: Callable[[Known], Awaitable[T]]) -> T:
        """Do something for which the topology must be right: again if it has changed meanwhile."""
        while True:
            try:
                return await use(await self.known())
            except Stale:
                self._known = None

    async def subscription(self, name: str) -> Subscription:
        """As it stands now. Raises ``SubscriptionNotFound``."""
        known = await self.read()
        if name not in known.subscriptions:
            raise missing(name)
        return known.subscriptions[name]

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> Known:
        """Write what differs. Returns what stands then. Raises ``ConfigurationError``."""
        self._known = None
        await self.using(lambda known: self._write(known, topics, subscriptions))
        return await self.read()

    async def filled(self, subscription: str) -> None:
        """It has been given what was retained before it."""
        with self._link.using() as client:
            await client.hdel(self._link.key("topology"), f"filling:{escape(subscription)}")

    async def _write(self, known: Known, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        check(known, topics, subscriptions)
        changes: list[Any] = []
        for topic in topics:
            if known.topics.get(topic.name) != topic:
                changes += (f"topic:{escape(topic.name)}", msgspec.json.encode(topic))
        for item in subscriptions:
            if _encoded(item) != _encoded(known.subscriptions.get(item.name)):
                changes += (f"sub:{escape(item.name)}", _encoded(item))
            if item.start == "earliest" and item.name not in known.subscriptions:
                # A crash before it is done is made good by whoever declares it next.
                changes += (f"filling:{escape(item.name)}", "1")
        if changes:
            await self._link.run("declare", len(changes), *changes, version=known.version)


def check(known: Known, topics: Iterable[Topic], subscriptions: Iterable[Subscription]) -> None:
    """Raises ``ConfigurationError`` unless every queue has one subscription, its own, and stays a queue."""
    for topic in topics:
        before = known.topics.get(topic.name)
        if before is not None and before.queue != topic.queue:
            kind = "queue" if before.queue else "topic"
            raise ConfigurationError(f"{topic.name!r} is a {kind} on this server already; choose another name")
    every = {**known.topics, **{topic.name: topic for topic in topics}}
    queues = {name for name, topic in every.items() if topic.queue}
    named = {**known.subscriptions, **{item.name: item for item in subscriptions}}
    for item in named.values():
        if item.name != item.pattern and queues & {item.name, item.pattern}:
            queue = item.pattern if item.pattern in queues else item.name
            raise ConfigurationError(
                f"subscription {item.name!r} of {item.pattern!r}: {queue!r} is a queue, which has exactly one "
                "subscription, of its own name; publish to a topic to reach several"
            )
    for queue in sorted(queues - named.keys()):
        # It would accept jobs and drop them.
        raise ConfigurationError(f"queue {queue!r} has no subscription; declare one of the same name with it")


def missing(name: str) -> SubscriptionNotFound:
    return SubscriptionNotFound(f"no queue or subscription {name!r}; declare it first")


def _decoded(stored: dict[bytes, bytes]) -> Known:
    topics, subscriptions, filling = {}, {}, set()
    for field, value in stored.items():
        if field.startswith(b"topic:"):
            topic = _topic.decode(value)
            topics[topic.name] = topic
        elif field.startswith(b"sub:"):
            item = _subscription.decode(value)
            subscriptions[item.name] = item
        elif field.startswith(b"filling:"):
            filling.add(field.removeprefix(b"filling:").decode())
    version = stored.get(b"version", b"0").decode()
    return Known(version, topics, dict(sorted(subscriptions.items())), frozenset(filling), {})


def _encoded(item: Subscription | None) -> bytes:
    if item is None:
        return b""
    return msgspec.json.encode(msgspec.structs.replace(item, where=dict(sorted(item.where.items()))))
