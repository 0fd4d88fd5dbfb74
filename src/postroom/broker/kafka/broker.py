"""The Kafka broker itself."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, count, zip_longest
from typing import ClassVar

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from postroom.broker.base import Broker, Capabilities, Subscription, SubscriptionStats, Topic
from postroom.broker.demands import check_topology
from postroom.broker.kafka import doctor, wire
from postroom.broker.kafka.consumer import KafkaConsumer
from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.groups import Groups
from postroom.broker.kafka.hub import Hub
from postroom.broker.kafka.letters import Letters
from postroom.broker.kafka.options import parse
from postroom.broker.kafka.reader import Reader
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.survey import Survey
from postroom.broker.kafka.topology import Entry, Topology
from postroom.broker.kafka.trim import trim
from postroom.broker.kafka.wire import Envelope, Record
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    MessageTooLarge,
    PostroomError,
    SubscriptionNotFound,
    TopicNotFound,
    ValidationError,
)
from postroom.message import DeadLetter, Message

logger = logging.getLogger("postroom.broker")

_REFRESH = 1.0
"""Seconds within which what another process declares is known here."""
_TRIM = 60.0
"""Seconds, more or less, after which what is done is deleted."""


class KafkaBroker(Broker):
    """``kafka://host:9092``, ``kafka+ssl://user:password@host1,host2``; options: see ``docs/brokers/kafka.md``."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="replicated",
        shared=True,
        death_notice=10.0,
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
        start_notes=True,
        expiry=True,
        limits=False,
        exact_stats=False,
        retention=True,
        max_message_size=wire.MAX_BODY,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """Raises ``ConfigurationError``."""
        self.options = parse(url)
        self._names = self.options.names
        self._clock = clock or SystemClock()
        self._closed = False
        self._consumers: set[KafkaConsumer] = set()
        self._hubs: dict[str, Hub] = {}
        self._letters: dict[tuple[str, int], Letters] = {}
        self._spread = count()
        self._admin_client: AdminClient | None = None
        self._groups = Groups(self.options)
        self._sender: Sender
        self._reader: Reader
        self._topology: Topology | None = None
        self._watching: asyncio.Task[None] | None = None

    # Opening and closing

    async def connect(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._topology is not None:
            return
        sender, reader = Sender(self.options), Reader(self.options)
        try:
            sender.warm()
        except KafkaException as error:
            raise translated("cannot connect", error_of(error)) from error
        topology = Topology(self.options, sender, reader, self._admin, self._clock)
        try:
            await topology.open()
        except BaseException:
            await sender.close()
            await reader.close()
            raise
        self._sender, self._reader, self._topology = sender, reader, topology
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(consumer.close() for consumer in self._consumers))
        if self._topology is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        await self._sender.close()
        await self._reader.close()
        self._groups.close()
        self._admin_client = None

    async def _watch(self) -> None:
        """See what other processes declare, and make room. Until cancelled."""
        trim_at = self._clock.now() + _TRIM * random.random()
        while True:
            await asyncio.sleep(_REFRESH)
            if self._hubs:
                try:
                    await self._opened().refresh()
                    self._tell_hubs()
                    if self._clock.now() >= trim_at:
                        trim_at = self._clock.now() + _TRIM * (0.5 + random.random())
                        await self.trim()
                except BrokerUnavailable as error:
                    logger.debug("cannot look after the topology: %s", error)
                except ConfigurationError as error:
                    logger.warning("cannot make room: %s", error)
                except Exception:
                    # Without it nobody here would hear of what others declare.
                    logger.exception("Kafka: a defect; the look after the topology goes on")

    async def trim(self) -> None:
        """Delete what is done; by itself once a minute while there are consumers. Raises ``BrokerUnavailable``."""
        await trim(self.options, self._opened(), self._admin, self._survey)

    def _tell_hubs(self) -> None:
        topology = self._opened()
        for name, hub in self._hubs.items():
            # What was deleted and declared again since is another one of the same name.
            hub.update(topology.subscriptions.get(name) if topology.removals[name] == hub.removals else None)

    # Topology

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        topology = self._opened()
        check_topology(self.capabilities, topics, subscriptions)
        await topology.declare(topics, subscriptions)
        self._tell_hubs()

    async def unsubscribe(self, subscription: str) -> None:
        await self._known(subscription)
        for consumer in [consumer for consumer in self._consumers if consumer.hub.name == subscription]:
            consumer.hub.removed = True
            await consumer.close()
        # Who dies before the last step can begin again; nothing is left that would come back with the name.
        await self._opened().empty(subscription)
        await self._groups.delete(self._names.group(subscription))
        await self._opened().remove(subscription)

    # In

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        topology = self._opened()
        if not all(topology.has(topic) for topic in {message.topic for message in messages}):
            await topology.refresh()
            self._opened()
        answers: list[str | PostroomError] = []
        records: list[Record] = []
        for message in messages:
            made = self._record(message, topology)
            if isinstance(made, Record):
                records.append(made)
                answers.append(message.id)
            else:
                answers.append(made)
        errors = iter(await self._sender.send(records))
        failed = 0
        for number, answer in enumerate(answers):
            if isinstance(answer, str) and (error := next(errors)) is not None:
                answers[number] = translated(f"message {answer} is not confirmed", error)
                failed += 1
        if failed and failed == len(messages):
            raise next(answer for answer in answers if isinstance(answer, PostroomError))
        return answers

    def _record(self, message: Message, topology: Topology) -> Record | PostroomError:
        if message.topic not in topology.topics:
            return TopicNotFound(f"no queue or topic is named {message.topic!r}; declare it first")
        name = self._names.topic(message.topic)
        if name not in topology.partitions:
            return TopicNotFound(f"topic {message.topic!r}: its Kafka topic {name} was deleted; declare it again")
        order = _order(topology.partitions[name])
        try:
            return wire.message_record(
                message, name, -1 if message.key is not None else order[next(self._spread) % len(order)]
            )
        except (MessageTooLarge, ValidationError) as error:
            return error

    # Out

    async def consume(self, subscription: str, *, lease: float = 30.0) -> KafkaConsumer:
        if lease <= 0:
            raise ConfigurationError(f"consume: lease must be more than 0 seconds, not {lease}")
        entry = await self._known(subscription)
        hub = self._hubs.get(subscription)
        if hub is None:
            hub = self._hubs[subscription] = Hub(
                self.options, self._sender, self._opened(), self._letters_of(subscription), self._clock, entry
            )
        consumer = KafkaConsumer(hub, self._names, self._sender, self._clock, lease, self._left)
        self._consumers.add(consumer)
        return consumer

    async def _left(self, consumer: KafkaConsumer) -> None:
        """With its last consumer here a subscription's partitions are for others."""
        self._consumers.discard(consumer)
        hub = consumer.hub
        if self._hubs.get(hub.name) is hub and all(other.hub is not hub for other in self._consumers):
            del self._hubs[hub.name]
            await hub.close()

    # Operators

    async def stats(self) -> list[SubscriptionStats]:
        topology = self._opened()
        await topology.refresh()
        now = self._clock.now()
        entries = [topology.subscriptions[name] for name in sorted(topology.subscriptions)]
        return await asyncio.gather(*(self._survey(entry).stats(now) for entry in entries))

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        await self._known(subscription)
        return await self._letters_of(subscription).page(ids, after, limit)

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        entry = await self._known(subscription)
        letters = self._letters_of(subscription)
        async with letters.redriving:
            anew = [
                wire.changed(told, {"attempt": 1, "due": None, "suspect": False, "redriven": told.redriven + 1})
                for told in await letters.envelopes(ids)
            ]
            return await self._revive(entry, anew)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        await self._known(subscription)
        letters = self._letters_of(subscription)
        found = [told.message for told in await letters.envelopes(ids)]
        await letters.bury_no_more(found)
        return _ids(found)

    async def purge(self, subscription: str) -> int:
        entry = await self._known(subscription)
        gone, marks = await self._survey(entry).waiting()
        await self._opened().purge(subscription, marks)
        self._tell_hubs()
        return gone

    async def replay(self, subscription: str, since: float | None = None) -> int:
        entry = await self._known(subscription)
        found = await self._survey(entry).ended(since)
        anew = [Envelope(message=told.message, replayed=True) for told in found]
        return len(await self._revive(entry, anew))

    async def examine(self) -> list[Finding]:
        if self._topology is None:
            return []
        return await doctor.examine(self._admin(), self.options)

    async def _revive(self, entry: Entry, found: Sequence[Envelope]) -> list[str]:
        """Copies for a subscription, confirmed; then they are no longer dead."""
        survey = self._survey(entry)
        await self._sender.deliver(
            "cannot move the messages", [survey.addressed(told, next(self._spread)) for told in found]
        )
        ids = _ids([told.message for told in found])
        letters = self._letters_of(entry.asked.name)
        await letters.bury_no_more([told.message for told in await letters.envelopes(ids)])
        return ids

    # Parts

    def _opened(self) -> Topology:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._topology is None:
            raise BrokerClosed("the broker is not connected; await connect() first")
        return self._topology

    async def _known(self, subscription: str) -> Entry:
        topology = self._opened()
        await topology.refresh()
        self._opened()
        entry = topology.subscriptions.get(subscription)
        if entry is None:
            raise SubscriptionNotFound(f"no subscription is named {subscription!r}; declare it first")
        return entry

    def _letters_of(self, subscription: str) -> Letters:
        which = (subscription, self._opened().removals[subscription])
        if which not in self._letters:
            self._letters[which] = Letters(self._names, subscription, self._reader, self._sender)
        return self._letters[which]

    def _survey(self, entry: Entry) -> Survey:
        letters = self._letters_of(entry.asked.name)
        return Survey(self._names, self._opened(), self._reader, letters, self._groups, entry)

    def _admin(self) -> AdminClient:
        if self._admin_client is None:
            self._admin_client = AdminClient(self.options.client | {"reconnect.backoff.max.ms": 1000, "log_level": 2})
        return self._admin_client


def _ids(messages: Sequence[Message]) -> list[str]:
    return list(dict.fromkeys(message.id for message in messages))


@lru_cache(maxsize=64)
def _order(partitions: int) -> list[int]:
    """In which partitions are filled: each next one far from the last, so that neighbours go to different members."""
    half = (partitions + 1) // 2
    pairs = zip_longest(range(half), range(half, partitions))
    return [number for number in chain.from_iterable(pairs) if number is not None]
