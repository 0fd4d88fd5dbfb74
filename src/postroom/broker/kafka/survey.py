"""What a subscription has to do, seen from outside: what its group has committed, held against what is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from postroom.broker.base import SubscriptionStats
from postroom.broker.kafka import wire
from postroom.broker.kafka.groups import Groups
from postroom.broker.kafka.ledger import Ledger
from postroom.broker.kafka.letters import Letters
from postroom.broker.kafka.options import Names
from postroom.broker.kafka.reader import Place, Reader
from postroom.broker.kafka.topology import Entry, Mark, Topology
from postroom.broker.kafka.wire import Envelope, Record

_LOOKED_AT = 2_000
"""Records of one partition that are looked at for numbers; what lies behind them counts as ready."""


class Stretch(NamedTuple):
    """One partition of a subscription."""

    ledger: Ledger
    end: int


class Waiting(NamedTuple):
    """A message that is not done."""

    place: Place
    offset: int
    envelope: Envelope
    written: float
    running: bool


class Survey:
    """Of one subscription."""

    def __init__(
        self, names: Names, topology: Topology, reader: Reader, letters: Letters, groups: Groups, entry: Entry
    ) -> None:
        self._names = names
        self._topology = topology
        self._reader = reader
        self._letters = letters
        self._groups = groups
        self._entry = entry
        self._later = names.later(entry.asked.name)

    async def stretches(self) -> dict[Place, Stretch]:
        """Every partition of the subscription."""
        topics = [*self._topology.heard_by(self._entry), self._later]
        places = [(topic, number) for topic in topics for number in range(self._topology.partitions.get(topic, 0))]
        committed = await self._groups.committed(self._names.group(self._entry.asked.name), places)
        ends = await self._topology.ends(topics)
        found: dict[Place, Stretch] = {}
        for topic, offsets in ends.items():
            for number, end in enumerate(offsets):
                place = (topic, number)
                offset, text = committed.get(place, (None, None))
                start = self._entry.start(place, offset)
                ledger = Ledger.read(start or 0, text if start == offset else None)
                found[place] = Stretch(ledger, end)
        return found

    async def stats(self, now: float) -> SubscriptionStats:
        """In numbers. ``now``: unix time."""
        stretches = await self.stretches()
        dead = await self._letters.count()
        limits = {
            place: min(stretch.end, (stretch.ledger.prefix or 0) + _LOOKED_AT) for place, stretch in stretches.items()
        }
        waiting = await self._reader.call(lambda reader: list(self._waiting(reader, stretches, limits)))
        ready = sum(max(0, stretch.end - limits[place]) for place, stretch in stretches.items())
        delayed = running = 0
        oldest: float | None = None
        keys: set[str] = set()
        for item in waiting:
            message = item.envelope.message
            behind = self._entry.asked.ordered and message.key is not None and message.key in keys
            if (
                not item.running
                and message.expires_at is not None
                and message.expires_at <= now
                and not item.envelope.redriven
            ):
                continue
            keys.add(message.key or "")
            if item.running:
                running += 1
            elif behind or (item.envelope.due or 0.0) > now:
                delayed += 1
            else:
                ready += 1
                oldest = max(oldest or 0.0, now - max(item.written, item.envelope.due or 0.0))
        asked = self._entry.asked
        queue = self._topology.is_queue(asked.name)
        return SubscriptionStats(
            name=asked.name, pattern=asked.pattern, queue=queue, ready=ready, delayed=delayed, running=running,
            dead=dead, oldest=oldest,
        )  # fmt: skip

    async def waiting(self) -> tuple[int, dict[str, dict[str, Mark]]]:
        """How many wait, and where they and all before them are; what runs is left out."""
        stretches = await self.stretches()
        ends = {place: stretch.end for place, stretch in stretches.items()}
        waiting = await self._reader.call(
            lambda reader: [item for item in self._waiting(reader, stretches, ends) if not item.running]
        )
        purged: dict[str, dict[str, Mark]] = {}
        for (topic, number), stretch in stretches.items():
            purged.setdefault(topic, {})[str(number)] = Mark(stretch.end, sorted(stretch.ledger.out))
        return len(waiting), purged

    async def ended(self, since: float | None) -> list[Envelope]:
        """Retained messages that this subscription has ended with, and does not have before it once more."""
        stretches = await self.stretches()
        ends = {place: stretch.end for place, stretch in stretches.items()}
        spans: dict[Place, tuple[int, int]] = {}
        for topic in list(self._topology.topics.values()):  # What is declared meanwhile begins behind these ends.
            name = self._names.topic(topic.name)
            if topic.retention and not topic.queue and (name, 0) in ends:
                for number, start in enumerate(await self._topology.retained(topic, since)):
                    spans[(name, number)] = (start, ends[(name, number)])

        def read(reader: Reader) -> list[Envelope]:
            pending = {item.envelope.message.id for item in self._waiting(reader, stretches, ends)}
            found: dict[str, tuple[int, Envelope]] = {}
            for record in reader.records(spans):
                envelope = wire.read(record, self._names.topic_of(record.topic()))
                place = (record.topic(), record.partition())
                wanted = envelope.to is None and self._entry.wants(envelope.message, place, record.offset())
                if wanted and envelope.message.id not in pending:
                    found.setdefault(envelope.message.id, (record.timestamp()[1], envelope))
            return [envelope for _, envelope in sorted(found.values(), key=lambda pair: pair[0])]

        return await self._reader.call(read)

    def addressed(self, envelope: Envelope, partition: int) -> Record:
        """A copy for this subscription alone: beside the others of its key, if there is an order to keep."""
        key = envelope.message.key
        partition = partition % self._topology.partitions.get(self._later, 1) if key is None else -1
        if self._entry.asked.ordered:
            topic = self._names.topic(envelope.message.topic)
            return wire.envelope_record(wire.changed(envelope, {"to": self._entry.asked.name}), topic, None, partition)
        return wire.envelope_record(envelope, self._later, None, partition)

    def _waiting(self, reader: Reader, stretches: dict[Place, Stretch], limits: dict[Place, int]) -> Iterator[Waiting]:
        spans = {place: (stretch.ledger.prefix or 0, limits[place]) for place, stretch in stretches.items()}
        for record in reader.records(spans):
            place, offset = (record.topic(), record.partition()), record.offset()
            ledger = stretches[place].ledger
            envelope = wire.read(record, self._names.topic_of(place[0]))
            if self._concerns(place, offset, envelope, ledger):
                told = (self._letters.trial(place, offset) if self._entry.asked.ordered else None) or envelope
                yield Waiting(place, offset, told, record.timestamp()[1] / 1000, offset in ledger.out)

    def _concerns(self, place: Place, offset: int, envelope: Envelope, ledger: Ledger) -> bool:
        if ledger.is_done(offset) or (self._entry.is_purged(place, offset) and offset not in ledger.out):
            return False
        if place[0] == self._later:
            return True
        if envelope.to is not None:
            return envelope.to == self._entry.asked.name
        return self._entry.wants(envelope.message, place, offset)
