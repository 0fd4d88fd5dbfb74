"""What is declared on the server, and how it is known to everybody.

AMQP lets nobody list queues and bindings. So all topics and subscriptions stand in a register on the server too: from
it a process knows what others have declared, and which bindings a changed subscription leaves behind.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from postroom.broker.amqp import ladder, wire
from postroom.broker.amqp.address import Address
from postroom.broker.amqp.confirms import Publisher
from postroom.broker.amqp.link import LOCKED, PRECONDITION_FAILED, Channel, Link, Refused
from postroom.broker.amqp.register import Register
from postroom.broker.base import Subscription, Topic
from postroom.broker.routing import matches
from postroom.errors import BrokerUnavailable, ConfigurationError, SubscriptionNotFound

logger = logging.getLogger("postroom.broker")

BACKSTOP = 100
"""Deaths of holders of one copy after which the server itself dead-letters it; ours come long before."""

PRIORITIES_SINCE = (4, 3)
"""Every quorum queue then hands out the highest of 32 first; 4.0 has two levels, of which the lower gets a share."""

_ELSEWHERE = 5.0
"""Seconds for which others may be reading the topology, one after the other, on a slow server."""
_FROZEN = 4
"""Heartbeats after which the server has surely closed the connection of a client that gives no sign of life; it does
so after two (rabbitmq.com/docs/heartbeats)."""
_LONGEST_NAME = 200
"""Bytes: with the words of the ladder it must fit into a routing key."""
_UNLIMITED = 10 * 365 * 86_400 * 1000
SHELF_TIME = 10.0
"""Seconds that a copy may lie on a shelf before it goes back."""
_SHELF_UNUSED = 7 * 86_400 * 1000
"""Milliseconds after which the queue of a dead worker goes: long after the last of its messages has gone back."""
_LOCK_PATIENCE = 60.0
_LOCK_PAUSE = 0.05


class State(msgspec.Struct):
    """What the register holds."""

    topics: dict[str, Topic] = msgspec.field(default_factory=dict)
    subscriptions: dict[str, Subscription] = msgspec.field(default_factory=dict)

    def is_queue(self, name: str) -> bool:
        return name in self.topics and self.topics[name].queue

    def wanting(self, topic: str) -> list[Subscription]:
        """The subscriptions of a topic that is no queue; a filter may still keep a message from them."""
        return [
            known
            for known in self.subscriptions.values()
            if not self.is_queue(known.name) and matches(known.pattern, topic)
        ]


class Binding(NamedTuple):
    source: str
    destination: str
    routing_key: str
    where: tuple[tuple[str, str], ...] = ()
    to_exchange: bool = False


class Directory:
    """The topology as last read, and the changing of it."""

    def __init__(self, link: Link, publisher: Publisher, address: Address) -> None:
        self._link = link
        self._address = address
        self._register = Register(link, publisher, address.internal("topology"))
        self._mutex = asyncio.Lock()
        self._has_base = False
        self.known = State()

    async def refresh(self) -> State:
        """Read what others have declared meanwhile. Raises ``BrokerUnavailable``."""
        try:
            text = await self._register.read(_ELSEWHERE)
        except Refused as error:
            raise _refusal(error) from error
        if text is None:
            raise BrokerUnavailable("somebody else is reading what is declared, and does not give it back; try again")
        return self._read(text)

    def _read(self, text: bytes) -> State:
        try:
            self.known = msgspec.json.decode(text, type=State) if text else State()
        except msgspec.DecodeError as error:
            name = self._address.internal("topology")
            raise ConfigurationError(f"what is in the queue {name!r} is not Postroom's: {error}; remove it") from error
        return self.known

    async def subscription(self, name: str) -> Subscription:
        """Raises ``SubscriptionNotFound``."""
        found = self.known.subscriptions.get(name) or (await self.refresh()).subscriptions.get(name)
        if found is None:
            raise SubscriptionNotFound(f"no subscription {name!r} is known to the broker; declare it first")
        return found

    async def topic(self, name: str) -> Topic | None:
        return self.known.topics.get(name) or (await self.refresh()).topics.get(name)

    async def has(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> bool:
        """Whether all of this is known, just so."""
        try:
            state = await self.refresh()
        except BrokerUnavailable:
            # Who made the queue has died before anything was in it; whoever has the lock sees to that.
            return False
        return all(state.topics.get(topic.name) == topic for topic in topics) and all(
            state.subscriptions.get(wanted.name) == wanted for wanted in subscriptions
        )

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[State]:
        """The topology, while nobody else changes it. What was changed in it is written at the end."""
        async with self._mutex:
            lock = await self._lock()
            try:
                # Whoever reads is thrown out by the server if he is frozen. After that nobody does: it is empty.
                patience = _ELSEWHERE + _FROZEN * self._address.heartbeat
                text = await self._register.read(patience) or b""
                before = self._read(text)
                state = State(dict(before.topics), dict(before.subscriptions))
                yield state
                if state != before:
                    await self._declare_kept(self._address.internal("topology"))
                    # By the channel of the lock: if that is gone, another may have declared something meanwhile.
                    await self._register.replace(lock, text, msgspec.json.encode(state, enc_hook=dict), patience)
                self.known = state
            except Refused as error:
                raise _refusal(error) from error
            finally:
                # With the channel goes nothing; the lock is a queue that ends with its connection, or here.
                if lock.reason is None:
                    await lock.call("queue_delete", queue=self._lock_name)
                    await lock.close()

    async def build(self, state: State, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        """Make on the server what these need, and take away what they no longer need. ``state`` is as it was."""
        channel = await self._link.channel()
        try:
            if not self._has_base:
                await channel.call(
                    "exchange_declare", exchange=self._address.events, exchange_type="topic", durable=True
                )
                await ladder.declare(channel, self._address)
                self._has_base = True
            for topic in topics:
                if topic.retention:
                    await self._build_history(channel, topic)
            queues = {topic.name for topic in topics if topic.queue}
            for subscription in subscriptions:
                is_queue = subscription.name in queues or state.is_queue(subscription.name)
                await self._build(channel, subscription, is_queue, state.subscriptions.get(subscription.name))
        except Refused as error:
            raise _refusal(error) from error
        finally:
            await channel.close()

    async def remove(self, subscription: Subscription, is_queue: bool) -> None:
        """Delete all of a subscription from the server."""
        address, name = self._address, subscription.name
        channel = await self._link.channel()
        try:
            for binding in self._bindings(subscription, is_queue):
                if binding.source == address.events and binding.to_exchange:
                    await channel.call("exchange_delete", exchange=binding.destination)
            for queue in (address.queue(name), address.dead(name), address.state(name)):
                await channel.call("queue_delete", queue=queue)
        finally:
            await channel.close()

    async def _lock(self) -> Channel:
        """An exclusive queue is a lock: only one connection can have it, and it goes with that connection."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOCK_PATIENCE
        while loop.time() < deadline:
            channel = await self._link.channel()
            try:
                await channel.call("queue_declare", queue=self._lock_name, exclusive=True)
                return channel
            except Refused as error:
                if error.code != LOCKED:
                    raise _refusal(error) from error
            await asyncio.sleep(_LOCK_PAUSE)
        raise BrokerUnavailable(f"for {_LOCK_PATIENCE:.0f} s others have been declaring; {self._lock_name!r} is locked")

    @property
    def _lock_name(self) -> str:
        return self._address.internal("topology:lock")

    async def _build(self, channel: Channel, wanted: Subscription, is_queue: bool, before: Subscription | None) -> None:
        queue, dead = self._address.queue(wanted.name), self._address.dead(wanted.name)
        await self._declare_kept(dead)
        arguments = self._arguments(dead)
        if wanted.ordered:
            await self._declare_kept(self._address.state(wanted.name), {"x-max-length": 1})
            await self._declare_kept(queue, {**arguments, "x-single-active-consumer": True})
        else:
            await _declare(channel, queue, {**arguments, "x-delivery-limit": BACKSTOP})
        bindings = self._bindings(wanted, is_queue)
        old = self._bindings(before, is_queue) if before is not None else []
        # The new ones first: no message falls between the two, and a queue bound twice still gets one copy.
        for binding in bindings:
            await _bind(channel, binding)
        for binding in old:
            if binding not in bindings:
                await _change(channel, "unbind", binding)
        for exchange in {binding.destination for binding in old if binding.to_exchange}:
            if exchange not in {binding.destination for binding in bindings}:
                await channel.call("exchange_delete", exchange=exchange)

    async def _declare_kept(self, queue: str, arguments: dict[str, Any] | None = None) -> None:
        """A queue whose messages are handed over and given back without limit."""
        channel = await self._link.channel()
        try:
            if version_of(self._link.server) < (4, 0):
                await _declare(channel, queue, arguments)
                return
            try:
                # There each time counts, and after twenty the message would be gone (rabbitmq.com/docs/quorum-queues).
                await _declare(channel, queue, {**(arguments or {}), "x-delivery-limit": -1})
            except Refused as error:
                if error.code != PRECONDITION_FAILED:
                    raise
                channel = await self._link.channel()
                await _declare(channel, queue, arguments)
                logger.warning(
                    "the queue %s was made before RabbitMQ 4.0, which drops what comes back twenty times; lift that: "
                    """rabbitmqctl set_policy --apply-to queues kept-%s '^%s$' '{"delivery-limit": -1}'""",
                    queue, queue, re.escape(queue),
                )  # fmt: skip
        finally:
            await channel.close()

    def _arguments(self, dead: str) -> dict[str, Any]:
        return {
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead,
            "x-dead-letter-strategy": "at-least-once",
            # Leases are ours; since 3.12 a queue can say that the server need not end long tasks.
            "x-consumer-timeout": _UNLIMITED,
        }

    async def _build_history(self, channel: Channel, topic: Topic) -> None:
        stream, address = self._address.history(topic.name), self._address
        arguments = {"x-queue-type": "stream", "x-max-age": f"{max(1, round(topic.retention))}s"}
        await channel.call("queue_declare", queue=stream, durable=True, arguments=arguments)
        await _bind(channel, Binding(address.events, stream, topic.name))
        await _bind(channel, Binding(ladder.end(address), stream, ladder.leads_to(ladder.to_topic(topic.name))))

    def _bindings(self, subscription: Subscription, is_queue: bool) -> list[Binding]:
        address = self._address
        queue, end = address.queue(subscription.name), ladder.end(address)
        bindings = [Binding(end, queue, ladder.leads_to(ladder.to_queue(subscription.name)))]
        if is_queue:
            return bindings
        pattern, delayed = subscription.pattern, ladder.leads_to(ladder.to_topic(subscription.pattern))
        if not subscription.where:
            return [*bindings, Binding(address.events, queue, pattern), Binding(end, queue, delayed)]
        by_header = address.filter(subscription.name, subscription.where)
        where = tuple(sorted(subscription.where.items()))
        return [
            *bindings,
            Binding(address.events, by_header, pattern, to_exchange=True),
            Binding(end, by_header, delayed, to_exchange=True),
            Binding(by_header, queue, "", where),
        ]


def shelf(queue: str) -> dict[str, Any]:
    """The arguments of a shelf for messages of ``queue``: to be taken from it at once, else they go back."""
    return {
        "x-queue-type": "quorum",
        "x-message-ttl": int(SHELF_TIME * 1000),
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-expires": _SHELF_UNUSED,
    }


def check(state: State, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    """Raises ``ConfigurationError`` unless every queue has one subscription, its own, and stays a queue."""
    for topic in topics:
        known = state.topics.get(topic.name)
        if known is not None and known.queue != topic.queue:
            is_now, would_be = ("queue", "topic") if known.queue else ("topic", "queue")
            raise ConfigurationError(f"{topic.name!r} is a {is_now} and cannot become a {would_be}; use another name")
    queues = {name for name, topic in state.topics.items() if topic.queue} | {t.name for t in topics if t.queue}
    named = {**state.subscriptions, **{subscription.name: subscription for subscription in subscriptions}}
    for subscription in named.values():
        if subscription.name != subscription.pattern and queues & {subscription.name, subscription.pattern}:
            queue = subscription.pattern if subscription.pattern in queues else subscription.name
            raise ConfigurationError(
                f"subscription {subscription.name!r} of {subscription.pattern!r}: {queue!r} is a queue, which has "
                "exactly one subscription, of its own name; publish to a topic to reach several"
            )
        for header in subscription.where:
            if not wire.can_be_shown(header):
                raise ConfigurationError(
                    f"subscription {subscription.name!r}: where={{{header!r}: …}}: RabbitMQ cannot filter by headers "
                    "that begin with x-, cloudEvents or postroom, or are longer than 255 bytes"
                )
    for queue in sorted(queues - named.keys()):
        raise ConfigurationError(f"queue {queue!r} has no subscription; declare one of the same name with it")
    for name in {topic.name for topic in topics} | {s.name for s in subscriptions} | {s.pattern for s in subscriptions}:
        if len(name.encode()) > _LONGEST_NAME:
            raise ConfigurationError(f"{name[:40]!r}…: at most {_LONGEST_NAME} bytes fit into a routing key")


def version_of(server: dict[str, Any]) -> tuple[int, int]:
    """Major and minor."""
    major, minor = (str(server.get("version", "0.0")).split(".") + ["0"])[:2]
    return int(major), int(minor)


async def _declare(channel: Channel, queue: str, arguments: dict[str, Any] | None = None) -> None:
    await channel.call(
        "queue_declare", queue=queue, durable=True, arguments={"x-queue-type": "quorum", **(arguments or {})}
    )


async def _bind(channel: Channel, binding: Binding) -> None:
    if binding.to_exchange:
        await channel.call("exchange_declare", exchange=binding.destination, exchange_type="headers", durable=True)
    await _change(channel, "bind", binding)


async def _change(channel: Channel, verb: str, binding: Binding) -> None:
    source, key = binding.source, binding.routing_key
    arguments = {"x-match": "all", **dict(binding.where)} if binding.where else {}
    if binding.to_exchange:
        await channel.call(
            f"exchange_{verb}", destination=binding.destination, source=source, routing_key=key, arguments=arguments
        )
    else:
        await channel.call(
            f"queue_{verb}", queue=binding.destination, exchange=source, routing_key=key, arguments=arguments
        )


def _refusal(error: Refused) -> ConfigurationError:
    if error.code == PRECONDITION_FAILED:
        return ConfigurationError(
            f"RabbitMQ keeps it with other settings: {error}; let its workers empty it, delete it with "
            "`rabbitmqctl delete_queue NAME`, and declare again; or use another name"
        )
    return ConfigurationError(f"RabbitMQ refuses: {error}")
