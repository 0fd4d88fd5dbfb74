"""The SQS broker itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from postroom.broker.base import Broker, Capabilities, Subscription, SubscriptionStats, Topic
from postroom.broker.routing import wants
from postroom.broker.sqs import letters
from postroom.broker.sqs.address import parse
from postroom.broker.sqs.consumer import SQSConsumer
from postroom.broker.sqs.examination import examine
from postroom.broker.sqs.held import MOST_HIDDEN, Memory
from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.service import Answers, Missing, Service
from postroom.broker.sqs.topology import RETENTION, Route, Topology, each
from postroom.broker.sqs.wire import MOST_BODY, entry, pack
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    PostroomError,
    TopicNotFound,
    UnsupportedOperation,
)
from postroom.message import DeadLetter, Message

_COUNTS = (
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesDelayed",
    "ApproximateNumberOfMessagesNotVisible",
)
_LISTING_HOLDS = 30.0
"""Seconds for which the pages of dead letters are those of one reading: each is of all letters there are."""


class _Target(NamedTuple):
    address: str
    """A queue's URL, or an SNS topic's ARN."""
    room: int | None = None
    """Bytes that an SNS topic takes at once; ``None``: it is a queue."""
    is_beside: bool = False
    """The queue of an ordered subscription of an SNS topic."""


class SQSBroker(Broker):
    """Amazon SQS, with SNS where a message goes to several: ``sqs://region``.

    Credentials come from the usual AWS chain. Options of the URL: ``endpoint_url`` (an emulator), ``namespace``
    (default ``postroom``: how every queue and topic begins), ``wait`` (seconds a poll waits, 1 to 20, default 1).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="replicated",
        shared=True,
        # The lease, 30 s by default.
        death_notice=30.0,
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
        retention=False,
        max_message_size=MOST_BODY,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock``: for the times of messages; leases are the service's. Raises ``ConfigurationError``."""
        self._address = parse(url)
        self._clock = clock or SystemClock()
        self._service: Service | None = None
        self._topology: Topology | None = None
        self._memory = Memory()
        self._consumers: set[SQSConsumer] = set()
        self._listed: dict[str, list[DeadLetter]] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    async def connect(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._service is None:
            service = Service(self._address)
            try:
                await service.open()
                if self._closed:
                    raise BrokerClosed("the broker was closed while it connected; make a new one")
            except BaseException:
                await service.close()
                raise
            self._service, self._topology = service, Topology(service)

    async def close(self) -> None:
        self._closed = True
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        await asyncio.gather(*(consumer.close() for consumer in list(self._consumers)))
        if self._service is not None:
            service, self._service = self._service, None
            await service.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        _, topology = self._opened()
        await topology.declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        service, topology = self._opened()
        routes = await self._routes(topology, messages)
        errors: list[PostroomError | None] = [None] * len(messages)
        sends: dict[_Target, tuple[list[int], list[dict[str, Any]]]] = {}
        for number, message in enumerate(messages):
            try:
                for target, made in self._addressed(routes[message.topic], message):
                    numbers, entries = sends.setdefault(target, ([], []))
                    numbers.append(number)
                    entries.append(made)
            except PostroomError as error:
                errors[number] = error
        results = await asyncio.gather(*(_send(service, target, entries) for target, (_, entries) in sends.items()))
        for (target, (numbers, _)), told in zip(sends.items(), results, strict=True):
            for number, answer in zip(numbers, told, strict=True):
                if isinstance(answer, Missing):
                    topic = messages[number].topic
                    topology.forget(topic)
                    # An ordered subscription beside an SNS topic may have been removed meanwhile: it wants nothing.
                    answer = None if target.is_beside else _unknown(topic, answer)
                errors[number] = errors[number] or answer
        if errors and all(isinstance(error, BrokerUnavailable | BrokerClosed) for error in errors):
            assert errors[0] is not None
            raise errors[0]
        return [message.id if error is None else error for message, error in zip(messages, errors, strict=True)]

    async def consume(self, subscription: str, *, lease: float = 30.0) -> SQSConsumer:
        if not 0 < lease <= MOST_HIDDEN:
            raise ConfigurationError(f"consume: lease must be more than 0 and at most 12 h, not {lease} s")
        service, topology = self._opened()
        kept = await topology.find(subscription)
        consumer = SQSConsumer(
            service, kept, lease, clock=self._clock, memory=self._memory, closed=self._consumers.discard
        )
        self._consumers.add(consumer)
        if subscription not in self._keepers:
            keeping = letters.keep(service, kept, self._clock)
            self._keepers[subscription] = asyncio.get_running_loop().create_task(keeping)
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        _, topology = self._opened()
        found = await topology.all_recent()
        told = await each(sorted(found), lambda name: self._stats(topology, found[name]))
        return [stats for stats in told if stats is not None]

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        service, topology = self._opened()
        kept = await topology.find(subscription)
        listed = self._listed.get(subscription) if ids is None and after is not None else None
        found = listed or await letters.browse(service, kept, None if ids is None else set(ids))
        places = [place for place, item in enumerate(found) if item.message.id == after]
        start = places[-1] + 1 if places else 0
        if ids is None and listed is None and start + limit < len(found):
            self._listed[subscription] = found
            asyncio.get_running_loop().call_later(_LISTING_HOLDS, self._forget_listing, subscription, found)
        return found[start : start + limit]

    def _forget_listing(self, subscription: str, found: list[DeadLetter]) -> None:
        if self._listed.get(subscription) is found:
            del self._listed[subscription]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        service, topology = self._opened()
        self._listed.pop(subscription, None)
        return await letters.redrive(service, await topology.find(subscription), ids)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        service, topology = self._opened()
        self._listed.pop(subscription, None)
        return await letters.discard(service, await topology.find(subscription), ids)

    async def purge(self, subscription: str) -> int:
        service, topology = self._opened()
        return await letters.purge(service, await topology.find(subscription))

    async def unsubscribe(self, subscription: str) -> None:
        _, topology = self._opened()
        await topology.unsubscribe(await topology.find(subscription))

    async def examine(self) -> list[Finding]:
        if self._closed or self._service is None or self._topology is None:
            return []
        return await examine(self._service, self._topology)

    def _opened(self) -> tuple[Service, Topology]:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._service is None or self._topology is None:
            raise BrokerClosed("the broker is not connected; await connect() first")
        return self._service, self._topology

    async def _routes(self, topology: Topology, messages: Sequence[Message]) -> dict[str, Route | PostroomError]:
        topics = list(dict.fromkeys(message.topic for message in messages))
        found = await asyncio.gather(*(topology.route(topic) for topic in topics), return_exceptions=True)
        routes: dict[str, Route | PostroomError] = {}
        for topic, route in zip(topics, found, strict=True):
            if isinstance(route, BaseException) and not isinstance(route, PostroomError):
                raise route
            routes[topic] = route
        return routes

    def _addressed(self, route: Route | PostroomError, message: Message) -> list[tuple[_Target, dict[str, Any]]]:
        """Where ``message`` goes: one entry for each. Raises its error."""
        if isinstance(route, PostroomError):
            raise route
        copy = pack(message, route.limit)
        made: list[tuple[_Target, dict[str, Any]]] = []
        if route.arn is not None:
            published = entry(copy, fifo=False)
            published["Message"] = published.pop("MessageBody")
            made.append((_Target(route.arn, room=route.limit), published))
        delay = 0.0 if message.not_before is None else message.not_before - self._clock.now()
        for kept in route.queues:
            if route.arn is None or wants(kept.declared, message):
                fifo = kept.declared.ordered
                if fifo and delay > RETENTION:
                    raise UnsupportedOperation(
                        f"message {message.id} is for later than 14 days from now, and {kept.name!r} is ordered: SQS "
                        "would drop it before; publish it later, or to a subscription that is not ordered",
                        "delay",
                    )
                target = _Target(kept.url, is_beside=route.arn is not None)
                made.append((target, entry(copy, fifo=fifo, delay=delay)))
        return made

    async def _stats(self, topology: Topology, kept: Kept) -> SubscriptionStats | None:
        """``None`` if somebody has just removed it."""
        own, dead = await asyncio.gather(_counts(topology, kept.url), _counts(topology, kept.dead_url))
        if own is None:
            return None
        ready, delayed, running = own
        return SubscriptionStats(
            name=kept.name,
            pattern=kept.declared.pattern,
            queue=kept.queue,
            ready=ready,
            delayed=delayed,
            running=running,
            dead=sum(dead or ()),
            # Only CloudWatch knows (ApproximateAgeOfOldestMessage).
            oldest=None,
        )


async def _counts(topology: Topology, url: str) -> list[int] | None:
    try:
        told = await topology.attributes(url, *_COUNTS)
    except Missing:
        return None
    return [int(told[name]) for name in _COUNTS]


async def _send(service: Service, target: _Target, entries: Sequence[dict[str, Any]]) -> Answers:
    if target.room is not None:
        return await service.publish(target.address, entries, target.room)
    return await service.send(target.address, entries)


def _unknown(topic: str, cause: Missing) -> TopicNotFound:
    error = TopicNotFound(f"the queue or topic {topic!r} has been deleted; declare it again")
    error.__cause__ = cause
    return error
