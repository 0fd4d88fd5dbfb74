"""What a consumer needs of its broker: somewhere to take messages from, and somewhere to store copies."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence

from postroom.broker.amqp import ladder, topology, wire
from postroom.broker.amqp.address import Address
from postroom.broker.amqp.confirms import Answer, Post, Publisher
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.frames import Arrived
from postroom.broker.amqp.link import NOT_FOUND, Link, Refused
from postroom.broker.amqp.register import Register
from postroom.broker.amqp.subscriber import Subscriber
from postroom.clock import Clock
from postroom.errors import ConfigurationError, PostroomError, SubscriptionNotFound


class Office:
    """One for each broker."""

    def __init__(self, link: Link, publisher: Publisher, address: Address, clock: Clock) -> None:
        self.clock = clock
        self._link = link
        self._publisher = publisher
        self._address = address
        self._put_off: dict[str, list[float]] = {}

    @property
    def is_blocked(self) -> bool:
        """Whether the server takes no copies now, as it has told."""
        return self._publisher.is_blocked

    async def subscribe(self, subscription: str, arrived: Arrived, lost: Callable[[], object]) -> Subscriber:
        """A new subscriber, on a channel of its own."""
        channel = await self._link.channel()
        queue = self._address.queue(subscription)
        try:
            await channel.call("queue_declare", queue=queue, passive=True)
        except Refused as error:
            raise gone(subscription, error) from error
        except asyncio.CancelledError:
            await channel.close()
            raise
        return Subscriber(channel, queue, arrived, lost)

    async def put(self, subscription: str, copies: Sequence[tuple[Copy, float]]) -> list[Answer]:
        """Store each copy in the subscription, to arrive after so many seconds."""
        posts = []
        for copy, delay in copies:
            exchange, routing_key = "", self._address.queue(subscription)
            if delay > 0:
                exchange, routing_key = ladder.way(self._address, delay, ladder.to_queue(subscription))
                self.note_delayed(subscription, self.clock.now() + delay)
            posts.append(Post(exchange, routing_key, wire.properties_of(copy), copy.message.body))
        return await self._publisher.send(posts)

    async def bury(self, subscription: str, copies: Sequence[Copy]) -> list[Answer]:
        """Store them among its dead letters."""
        return await self._store(self._address.dead(subscription), copies)

    async def open_shelf(
        self, subscription: str, name: str, arrived: Arrived, lost: Callable[[], object]
    ) -> Subscriber:
        """A queue for one consumer, and the subscriber that takes from it."""
        channel = await self._link.channel()
        queue = self._address.shelf(subscription, name)
        arguments = topology.shelf(self._address.queue(subscription))
        await channel.call("queue_declare", queue=queue, durable=True, arguments=arguments)
        return Subscriber(channel, queue, arrived, lost, requeues=False)

    async def put_on_shelf(self, subscription: str, name: str, copies: Sequence[Copy]) -> list[Answer]:
        return await self._store(self._address.shelf(subscription, name), copies)

    async def remove_shelf(self, subscription: str, name: str) -> None:
        """To be called when nothing is in it: the server does not look."""
        channel = await self._link.channel()
        await channel.call("queue_delete", queue=self._address.shelf(subscription, name))
        await channel.close()

    async def recall(self, subscription: str) -> tuple[int, bytes]:
        """The version and the state that was remembered last; ``b""`` if none was."""
        register = self._state_of(subscription)
        state = await register.look()
        return register.version, state

    async def remember(self, subscription: str, version: int, state: bytes) -> None:
        await self._state_of(subscription).write(version, state)

    def topic_of(self, exchange: str, routing_key: str) -> str:
        """Where a message was published that came by this way."""
        if exchange == ladder.end(self._address):
            return ladder.topic_of(routing_key)
        return routing_key if exchange else self._address.subscription_of(routing_key)

    def note_delayed(self, subscription: str, at: float) -> None:
        """For the numbers only."""
        self.count_delayed(subscription)
        heapq.heappush(self._put_off.setdefault(subscription, []), at)

    def count_delayed(self, subscription: str) -> int:
        """What this process has put off; the ladder is shared, and nobody can count it by subscription."""
        waiting = self._put_off.get(subscription, [])
        while waiting and waiting[0] <= self.clock.now():
            heapq.heappop(waiting)
        return len(waiting)

    def forget(self, subscription: str) -> None:
        self._put_off.pop(subscription, None)

    async def _store(self, queue: str, copies: Sequence[Copy]) -> list[Answer]:
        return await self._publisher.send(
            [Post("", queue, wire.properties_of(copy), copy.message.body) for copy in copies]
        )

    def _state_of(self, subscription: str) -> Register:
        return Register(self._link, self._publisher, self._address.state(subscription))


def gone(subscription: str, error: Refused) -> PostroomError:
    """Why the server does not have the queue of a subscription for us."""
    if error.code == NOT_FOUND:
        return SubscriptionNotFound(f"subscription {subscription!r} is gone from the server; declare it again")
    return ConfigurationError(f"subscription {subscription!r}: RabbitMQ refuses: {error}")
