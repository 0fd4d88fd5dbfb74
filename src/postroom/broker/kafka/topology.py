"""Who wants what, for every process to see: a compacted topic, one record for each topic and subscription."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from postroom.broker.base import Subscription, Topic
from postroom.broker.kafka.faults import error_of, translated
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place, Reader
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.wire import MAX_COPY, MAX_RECORD, Record
from postroom.broker.routing import matches, wants
from postroom.clock import Clock
from postroom.errors import ConfigurationError
from postroom.message import Message

_NEW = 2.0
"""Seconds within which a topic that was made is known everywhere; else it was deleted by somebody."""

Offsets = dict[str, list[int]]
"""For each Kafka topic an offset of each partition."""


T = TypeVar("T")


class Era(msgspec.Struct, frozen=True):
    """What a subscription asked for until it was declared anew: a change concerns later messages only."""

    asked: Subscription
    until: Offsets


class Mark(msgspec.Struct, frozen=True):
    """A purge: of one partition all below ``end`` is gone, but what ran then."""

    end: int
    running: list[int]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One subscription."""

    asked: Subscription
    begin: Offsets = {}
    """Where it begins in the topics that were there before it; in later ones it begins at 0."""
    eras: list[Era] = []
    purged: dict[str, dict[str, Mark]] = {}
    revision: int = 0
    """Of two processes that change it at once, the one whose record with the next number comes first is right."""

    def listens_to(self, topic: str) -> bool:
        return any(matches(asked.pattern, topic) for asked in self._ever())

    def wants(self, message: Message, place: Place, offset: int) -> bool:
        for era in self.eras:
            ends = era.until.get(place[0])
            if ends is not None and place[1] < len(ends) and offset < ends[place[1]]:
                return wants(era.asked, message)
        return wants(self.asked, message)

    def is_purged(self, place: Place, offset: int) -> bool:
        if not self.purged:
            return False
        mark = self.purged.get(place[0], {}).get(str(place[1]))
        return mark is not None and offset < mark.end and offset not in mark.running

    def start(self, place: Place, committed: int | None) -> int | None:
        """Where to go on; ``None``: where the log begins."""
        begins = self.begin.get(place[0], [])
        begin = begins[place[1]] if place[1] < len(begins) else None
        return max((offset for offset in (begin, committed) if offset is not None), default=None)

    def without(self, topics: Collection[str]) -> Entry:
        """No word of places in these Kafka topics, which were made anew."""

        def kept(told: Mapping[str, T]) -> dict[str, T]:
            return {topic: places for topic, places in told.items() if topic not in topics}

        eras = [msgspec.structs.replace(era, until=kept(era.until)) for era in self.eras]
        return msgspec.structs.replace(self, begin=kept(self.begin), eras=eras, purged=kept(self.purged))

    def _ever(self) -> list[Subscription]:
        return [self.asked, *(era.asked for era in self.eras)]


Change = Callable[[Entry | None], Awaitable[Entry | None]]
"""What a subscription becomes; ``None``: it is gone, and stays so."""


class Topology:
    """The table, and how it changes."""

    def __init__(
        self, options: Options, sender: Sender, reader: Reader, admin: Callable[[], AdminClient], clock: Clock
    ) -> None:
        self.topics: dict[str, Topic] = {}
        self.subscriptions: dict[str, Entry] = {}
        self.partitions: dict[str, int] = {}
        """Of each Kafka topic of the namespace."""
        self.removals: Counter[str] = Counter()
        """How often each subscription was deleted: what is declared under its name afterwards is another one."""
        self._options = options
        self._names = options.names
        self._sender = sender
        self._reader = reader
        self._admin = admin
        self._clock = clock
        self._read_to = 0
        self._declaring = asyncio.Lock()
        self._refreshing = asyncio.Lock()

    async def open(self) -> None:
        """Make the topic it is kept in, and read it. Raises ``BrokerUnavailable`` or ``ConfigurationError``."""
        self.partitions = await self._reader.call(Reader.topics)
        if self._names.topology not in self.partitions:
            await self._create([self._compacted(self._names.topology)])
        await self.refresh()

    async def refresh(self) -> None:
        """Read what was declared since."""
        async with self._refreshing:  # Who comes second must not act before the first has seen which topics there are.
            await self._refresh()

    async def _refresh(self) -> None:
        name = self._names.topology

        def read(reader: Reader) -> list[tuple[str, bytes | None]]:
            end = reader.bounds(name)[1]
            if end == self._read_to:
                return []
            records = reader.records({(name, 0): (self._read_to, end)})
            found = [((record.key() or b"").decode(), record.value()) for record in records]
            self._read_to = end
            return found

        changes = await self._reader.call(read)
        for key, value in changes:
            kind, _, subject = key.partition(":")
            table: dict[str, Any] = self.topics if kind == "topic" else self.subscriptions
            if value is None:
                table.pop(subject, None)
                self.removals[subject] += kind == "subscription"
            elif kind == "topic":
                self.topics[subject] = msgspec.json.decode(value, type=Topic)
            else:
                entry = msgspec.json.decode(value, type=Entry)
                if subject not in table or table[subject].revision < entry.revision:
                    self.subscriptions[subject] = entry
        there = [*map(self._names.topic, self.topics), *map(self._names.later, self.subscriptions)]
        if changes:
            await self._look_for(there)
        elif any(name not in self.partitions for name in there):
            # The last look has failed, or not every server knew of it yet.
            self.partitions = await self._reader.call(Reader.topics)

    def has(self, topic: str) -> bool:
        """Whether messages can be published to it, as far as is known here."""
        return topic in self.topics and self._names.topic(topic) in self.partitions

    def heard_by(self, entry: Entry) -> list[str]:
        """The Kafka topics of a subscription, without those of its own."""
        return [
            self._names.topic(topic.name)
            for topic in self.topics.values()
            if (topic.name == entry.asked.name if topic.queue else True) and entry.listens_to(topic.name)
        ]

    def is_queue(self, subscription: str) -> bool:
        return subscription in self.topics and self.topics[subscription].queue

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        """See ``Broker.declare``."""
        async with self._declaring:
            await self.refresh()
            self.partitions = await self._reader.call(Reader.topics)
            known = [entry.asked for entry in self.subscriptions.values()]
            _check(self.topics, known, topics, subscriptions)
            new_topics = [topic for topic in topics if self.topics.get(topic.name) != topic]
            before = self.topics
            all_topics = {**self.topics, **{topic.name: topic for topic in topics}}
            wanted = [self._plain(self._names.topic(topic.name)) for topic in topics]
            for subscription in subscriptions:
                wanted.append(self._plain(self._names.later(subscription.name)))
                wanted.append(self._compacted(self._names.dead(subscription.name)))
            anew = await self._create([topic for topic in wanted if topic.topic not in self.partitions])
            if anew:
                await self._change({name: partial(_without, topics=anew) for name in self.subscriptions})
            table = {**before, **all_topics}
            await self._change({each.name: partial(self._asked, asked=each, topics=table) for each in subscriptions})
            if new_topics:
                await self._sender.deliver(
                    "cannot declare", [self._record(f"topic:{topic.name}", topic) for topic in new_topics]
                )
                await self.refresh()

    async def purge(self, subscription: str, marks: Mapping[str, dict[str, Mark]]) -> None:
        """All that the marks say is gone from it."""

        async def purged(entry: Entry | None) -> Entry | None:
            return entry and msgspec.structs.replace(entry, purged={**entry.purged, **marks})

        await self._change({subscription: purged})

    async def empty(self, subscription: str) -> None:
        """Delete a subscription's own topics; a queue has no other."""
        gone = [self._names.later(subscription), self._names.dead(subscription)]
        gone += [self._names.topic(subscription)] if self.is_queue(subscription) else []
        futures = self._admin().delete_topics(gone, request_timeout=self._options.timeout)
        await self._all(futures, KafkaError.UNKNOWN_TOPIC_OR_PART)

    async def remove(self, subscription: str) -> None:
        """Forget a subscription."""
        kinds = ("subscription", "topic") if self.is_queue(subscription) else ("subscription",)
        await self._sender.deliver(
            "cannot unsubscribe", [self._record(f"{kind}:{subscription}", None) for kind in kinds]
        )
        await self.refresh()

    async def ends(self, topics: Sequence[str]) -> Offsets:
        """Of every partition the offset after the last."""
        partitions = self.partitions

        def read(reader: Reader) -> Offsets:
            return {
                topic: [reader.bounds(topic, number)[1] for number in range(partitions[topic])]
                for topic in topics
                if topic in partitions
            }

        return await self._reader.call(read)

    async def _change(self, changes: Mapping[str, Change]) -> None:
        """Change subscriptions. Who was overtaken by another process begins again with what that one has made of it,
        and writes in any case: the last record is what a process reads that starts later."""
        overtaken = False
        while changes:
            wanted: dict[str, Entry] = {}
            for name, change in changes.items():
                entry = self.subscriptions.get(name)
                changed = await change(entry)
                if changed is not None and (overtaken or changed != entry):
                    wanted[name] = msgspec.structs.replace(changed, revision=entry.revision + 1 if entry else 1)
            if not wanted:
                return
            await self._sender.deliver(
                "cannot declare", [self._record(f"subscription:{name}", entry) for name, entry in wanted.items()]
            )
            await self.refresh()
            changes = {
                name: changes[name] for name in wanted if _body(self.subscriptions.get(name)) != _body(wanted[name])
            }
            overtaken = True

    async def _asked(self, entry: Entry | None, *, asked: Subscription, topics: Mapping[str, Topic]) -> Entry:
        if entry is not None and _told(entry.asked) == _told(asked):
            return entry
        return await self._entry(entry, asked, topics)

    async def _entry(self, entry: Entry | None, asked: Subscription, topics: Mapping[str, Topic]) -> Entry:
        if entry is None:
            heard = [topic for topic in topics.values() if self._hears(asked, topic)]
            begin = await self._begins(heard, asked.start == "earliest")
            return Entry(asked=asked, begin=begin)
        old = [self._names.topic(topic.name) for topic in topics.values() if self._hears(entry.asked, topic)]
        new = [topic for topic in topics.values() if self._hears(asked, topic)]
        fresh = [topic for topic in new if self._names.topic(topic.name) not in (*old, *entry.begin)]
        begin = entry.begin | await self._begins(fresh, False)
        return msgspec.structs.replace(
            entry, asked=asked, begin=begin, eras=[*entry.eras, Era(entry.asked, await self.ends(old))][-8:]
        )

    def _hears(self, asked: Subscription, topic: Topic) -> bool:
        return topic.name == asked.name if topic.queue else matches(asked.pattern, topic.name)

    async def _begins(self, topics: Sequence[Topic], earliest: bool) -> Offsets:
        """Where a subscription begins that is declared now: at the end, or with what is retained."""
        known = [topic for topic in topics if topic.name in self.topics]
        begins = await self.ends([self._names.topic(topic.name) for topic in known])
        for topic in known:
            if earliest and topic.retention and not topic.queue:
                begins[self._names.topic(topic.name)] = await self.retained(topic)
        return begins

    async def retained(self, topic: Topic, since: float | None = None) -> list[int]:
        """Of every partition the first offset that its retention still covers, and that is no older than ``since``."""
        name = self._names.topic(topic.name)
        oldest = max(self._clock.now() - topic.retention, since or 0.0)
        partitions = self.partitions.get(name, 0)
        return await self._reader.call(lambda reader: reader.offsets_at(name, partitions, oldest))

    def _record(self, key: str, value: Topic | Entry | None) -> Record:
        return Record(self._names.topology, key.encode(), _body(value), [("content-type", b"application/json")], 0)

    def _plain(self, name: str) -> NewTopic:
        keep = -1 if self._options.retention is None else int(self._options.retention * 1000)
        return self._new(name, self._options.partitions, {"retention.ms": str(keep), "cleanup.policy": "delete"})

    def _compacted(self, name: str) -> NewTopic:
        return self._new(name, 1, {"cleanup.policy": "compact"})

    def _new(self, name: str, partitions: int, config: dict[str, str]) -> NewTopic:
        size = MAX_RECORD if self._names.topic_of(name) else MAX_COPY
        config |= {"max.message.bytes": str(size), "unclean.leader.election.enable": "false"}
        if self._options.min_isr is not None:
            config["min.insync.replicas"] = str(self._options.min_isr)
        return NewTopic(name, partitions, self._options.replication, config=config)

    async def _create(self, topics: list[NewTopic]) -> list[str]:
        """Returns which were not there."""
        if not topics:
            return []
        unique = {topic.topic: topic for topic in topics}
        futures = self._admin().create_topics(list(unique.values()), request_timeout=self._options.timeout)
        made = await self._all(futures, KafkaError.TOPIC_ALREADY_EXISTS)
        await self._look_for(list(unique))
        return made

    async def _look_for(self, names: Sequence[str]) -> None:
        """See which topics there are; not every server knows at once of one that was just made."""
        deadline = asyncio.get_running_loop().time() + _NEW
        while True:
            self.partitions = await self._reader.call(Reader.topics)
            if all(name in self.partitions for name in names) or asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.02)

    async def _all(self, futures: Mapping[str, Any], fine: int) -> list[str]:
        """Wait for all. Returns those that were done; of the others it was ``fine`` not to be."""
        done = []
        for name, future in futures.items():
            try:
                await asyncio.wrap_future(future)
                done.append(name)
            except KafkaException as error:
                if error_of(error).code() != fine:
                    raise translated(f"topic {name}", error_of(error)) from error
        return done


def _body(value: Topic | Entry | None) -> bytes | None:
    return None if value is None else msgspec.json.encode(value, enc_hook=dict)


async def _without(entry: Entry | None, *, topics: Collection[str]) -> Entry | None:
    return entry and entry.without(topics)


def _told(asked: Subscription) -> tuple[object, ...]:
    """What makes a difference when declared again; where to start concerns the first time only."""
    return (asked.pattern, dict(asked.where), asked.ordered)


def _check(
    known: Mapping[str, Topic],
    subscribed: Sequence[Subscription],
    topics: Sequence[Topic],
    subscriptions: Sequence[Subscription],
) -> None:
    """Raises ``ConfigurationError`` unless every queue has one subscription, its own, and stays a queue."""
    for topic in topics:
        before = known.get(topic.name)
        if before is not None and before.queue != topic.queue:
            is_now, would_be = ("queue", "topic") if before.queue else ("topic", "queue")
            raise ConfigurationError(f"{topic.name!r} is a {is_now} and cannot become a {would_be}; use another name")
    queues = {topic.name for topic in (*known.values(), *topics) if topic.queue}
    named = {subscription.name: subscription for subscription in (*subscribed, *subscriptions)}
    for subscription in named.values():
        if subscription.name != subscription.pattern and queues & {subscription.name, subscription.pattern}:
            queue = subscription.pattern if subscription.pattern in queues else subscription.name
            raise ConfigurationError(
                f"subscription {subscription.name!r} of {subscription.pattern!r}: {queue!r} is a queue, which has "
                "exactly one subscription, of its own name; publish to a topic to reach several"
            )
    for queue in sorted(queues - named.keys()):
        raise ConfigurationError(f"queue {queue!r} has no subscription; declare one of the same name with it")
