"""One subscription in one process: all its consumers share one place in the group, and what that place gives them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from confluent_kafka import KafkaError, TopicPartition

from postroom.broker.kafka import wire
from postroom.broker.kafka.backlog import Backlog, Claim, Item, Part
from postroom.broker.kafka.commits import Commits
from postroom.broker.kafka.fetcher import Fetcher
from postroom.broker.kafka.ledger import Ledger
from postroom.broker.kafka.letters import Letters
from postroom.broker.kafka.member import Member
from postroom.broker.kafka.mover import Mover
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.topology import Entry, Topology
from postroom.broker.kafka.wire import Envelope, Record
from postroom.clock import Clock

logger = logging.getLogger("postroom.broker")

MOST_HELD = 10_000
"""Messages of one partition that are held in memory; beyond it, it is not read on."""
READ_AHEAD = 1_000
"""The same, where nothing waits but for a worker: to read more is work for nothing if the partition moves."""
_IDLE_COMMIT = 0.5
"""Seconds after which what was skipped is committed though nobody waits for it."""


class Hub:
    """Made by the first consumer of a subscription, closed with the last. Lives on the event loop."""

    def __init__(
        self, options: Options, sender: Sender, topology: Topology, letters: Letters, clock: Clock, entry: Entry
    ) -> None:
        self.name = entry.asked.name
        self.lease = 0.0
        self.removed = False
        """Somebody has deleted the subscription."""
        self.entry = entry
        self.removals = topology.removals[self.name]
        self._options = options
        self._sender = sender
        self._topology = topology
        self._letters = letters
        self._clock = clock
        self._later = options.names.later(self.name)
        self._tag = os.urandom(6).hex()
        self._parts: dict[Place, Part] = {}
        self._backlog = Backlog(entry.asked.ordered)
        self._claims: set[Claim] = set()
        self.waiters: set[asyncio.Event] = set()
        """Set when there may be something to claim."""
        self._loop = asyncio.get_running_loop()
        self._member: Member | None = None
        self._fetcher: Fetcher | None = None
        self._epoch = 0
        self.commits: Commits
        self._mover = Mover(sender, clock, self._later, self.copy_to_later, self._have_moved)
        self._ticker: asyncio.TimerHandle | None = None
        self._stable = asyncio.Event()
        self._attended = self._loop.time()
        self._spread = itertools.count()

    # Lifecycle

    def open(self, lease: float) -> None:
        """One more consumer."""
        self.lease = max(self.lease, lease)
        if self._member is None:
            self._member = Member(self._options, self._options.names.group(self.name), self, max(5.0, self.lease))
            self.commits = Commits(self._options, self._member, self._parts, self._tag, self._give_up)
            self._fetcher = Fetcher(self._options, self.arrived, self._member.failed)
            self._tick()
        self.attend()

    async def joined(self) -> None:
        """Wait until the group has given this process its share."""
        await self._stable.wait()

    async def close(self) -> None:
        """Release everything and leave the group."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self._mover.close(self._options.timeout)
        if self._member is not None:
            await self._member.close()
            self._member = None
        if self._fetcher is not None:
            fetcher, self._fetcher = self._fetcher, None
            await fetcher.close()
        self.lost()

    def attend(self) -> None:
        """Somebody asks for messages: be a member, if we are not."""
        self._attended = self._loop.time()
        if self._member is not None:
            self._member.alive()
            self._member.follow([*self._topology.heard_by(self.entry), self._later])

    def update(self, entry: Entry | None) -> None:
        """The topology has changed."""
        if entry is None:
            self.removed = True
        elif entry != self.entry:
            if entry.asked.ordered != self.entry.asked.ordered:
                self._let_go()  # With the next share of the group it is the other way.
            self.entry = entry
            for part in self._parts.values():
                for item in list(part.items.values()):
                    if item.state == "waiting" and entry.is_purged((part.topic, part.number), item.offset):
                        self.finish(item)
        if not self.removed and self._member is not None and self._attended > self._loop.time() - self.lease:
            self._member.follow([*self._topology.heard_by(self.entry), self._later])
        self._wake()

    @property
    def trouble(self) -> KafkaError | None:
        return None if self._member is None else self._member.trouble

    # What the group says

    async def assigned(self, committed: list[tuple[Place, int | None, str | None]]) -> None:
        """See ``Listener``."""
        if self.entry.asked.ordered:
            await self._letters.refresh()
        if self._backlog.ordered != self.entry.asked.ordered:
            for each in self._parts.values():
                self._drop(each)
            self._parts.clear()
            self._backlog = Backlog(self.entry.asked.ordered)
        former = dict(self._parts)
        self._parts.clear()
        for place, offset, text in committed:
            part = former.pop(place, None)
            if part is None or not self._is_mine(part, offset, text):
                if part is not None:
                    self._drop(part)
                start = self.entry.start(place, offset)
                part = Part(*place, Ledger.read(start, text if start == offset else None))
                part.ledger.take_over()
                part.dirty = bool(part.ledger.deaths)
            elif part.ledger.out:
                part.dirty = True
            part.moving = part.paused = False
            self._parts[place] = part
        for part in former.values():
            self._drop(part)
        self._stable.set()
        self.commits.soon()
        self._wake()
        self._read_on()

    def _is_mine(self, part: Part, offset: int | None, text: str | None) -> bool:
        """Nobody else has had it meanwhile, for whoever hands something out commits that first."""
        return not part.committed if offset is None else Ledger.writer(text) == self._tag

    async def revoked(self) -> list[TopicPartition]:
        """See ``Listener``. What runs here may go on here: it is only released for the case that it may not."""
        self._stable.clear()
        self._epoch = 0
        deadline = self._loop.time() + self._options.handover
        # What runs is to end first, and what was copied is to be known as done. Both end in many ways.
        while (self._claims or self._mover.busy) and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # What moves already may be somebody else's by now: the last assignment has failed here.
        parts = [part for part in self._parts.values() if not part.moving]
        for part in parts:
            part.moving = True
        return [
            self.commits.place_of(part, released=True)
            for part in parts
            if part.ledger.prefix is not None and (part.dirty or part.ledger.out)
        ]

    def lost(self) -> None:
        """See ``Listener``."""
        self._stable.clear()
        for part in self._parts.values():
            self._drop(part)
        self._parts.clear()
        self._read_on()
        self._wake()

    def _read_on(self) -> None:
        if self._fetcher is not None:
            self._epoch = self._fetcher.read({place: part.ledger.resume for place, part in self._parts.items()})

    def arrived(self, epoch: int, records: list[Any]) -> None:
        """On the event loop. What was fetched before the last change of partitions comes again."""
        if epoch != self._epoch:
            return
        now, delayed = self._clock.now(), []
        for record in records:
            place = (record.topic(), record.partition())
            part = self._parts.get(place)
            if part is not None and part.ledger.next is not None and record.offset() < part.ledger.next:
                part = self._begin_anew(part, record.offset())
            if part is None or not part.ledger.see(record.offset()):
                continue
            item = self._item(part, record, place)
            if item is None:
                part.dirty = True
                part.ledger.skip(record.offset())
                continue
            self._backlog.add(item, now)
            if item.due:
                delayed.append(item)
            if len(part.items) >= self._most(part) and not part.paused and self._fetcher is not None:
                part.paused = True
                self._fetcher.pause(place, True)
        if not self.entry.asked.ordered:
            self._mover.arrived(delayed)
        self._wake()

    def _most(self, part: Part) -> int:
        return MOST_HELD if self.entry.asked.ordered or part.topic == self._later else READ_AHEAD

    def _item(self, part: Part, record: Any, place: Place) -> Item | None:
        """``None``: nobody here wants it."""
        offset = record.offset()
        envelope = wire.read(record, self._options.names.topic_of(place[0]))
        if self.entry.is_purged(place, offset):
            return None
        if place[0] != self._later:
            addressed = envelope.to
            if (
                addressed != self.name
                if addressed is not None
                else not self.entry.wants(envelope.message, place, offset)
            ):
                return None
        if self.entry.asked.ordered:
            envelope = self._letters.trial(place, offset) or envelope
        return Item(part, offset, envelope)

    # Out and back

    def claim(self, consumer: object, held: Iterable[Claim], most: int, lease: float) -> list[Claim]:
        """Hand out what can be done now; note it with ``noted`` before it is given to anybody."""
        if not self._stable.is_set():
            return []
        suspects = 0 if any(claim.suspect and claim.alive for claim in held) else 1
        now = self._clock.now()
        claims: list[Claim] = []
        while taken := list(self._backlog.take(most - len(claims), suspects, now)):
            for item in taken:
                message = item.envelope.message
                if message.expires_at is not None and message.expires_at <= now and not item.envelope.redriven:
                    self.finish(item)
                    continue
                claim = item.claim = Claim(item, consumer, self._loop.time() + lease)
                suspects -= claim.suspect
                item.part.dirty = True
                claims.append(claim)
        self._claims.update(claims)
        return claims

    def give_back(self, claims: Iterable[Claim], *, ahead: bool = True) -> None:
        """Uncounted, to be handed out again."""
        for claim in claims:
            self._claims.discard(claim)
            if claim.alive:
                claim.item.part.ledger.give_back(claim.item.offset)
                claim.item.part.dirty = True
                self._backlog.give_back(claim.item, self._clock.now(), ahead=ahead)
        self._wake()

    def note_start(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            claim.started = True
            if claim.alive:
                claim.item.part.ledger.out[claim.item.offset] = True
                claim.item.part.dirty = True
        self.commits.soon()

    def retry_in_place(self, item: Item, envelope: Envelope, due: float) -> None:
        """In an ordered subscription what is tried again keeps its place; its history is kept already."""
        ledger = item.part.ledger
        ledger.give_back(item.offset)
        ledger.deaths.pop(item.offset, None)
        item.part.dirty = True
        item.envelope, item.due = envelope, due

    def finish(self, item: Item) -> None:
        """It is done for good, once that is committed."""
        item.part.ledger.complete(item.offset)
        item.part.dirty = True
        self.remove(item)

    def remove(self, item: Item) -> None:
        """Forget what is done."""
        if item.claim is not None:
            self._claims.discard(item.claim)
        self._backlog.remove(item, self._clock.now())
        part = item.part
        if part.paused and len(part.items) < self._most(part) // 2 and self._fetcher is not None:
            part.paused = False
            self._fetcher.pause((part.topic, part.number), False)
        self._wake()

    def copy_to_later(self, envelope: Envelope) -> Record:
        """The record of a copy that only this subscription gets."""
        partitions = self._topology.partitions.get(self._later, 1)
        keyed = envelope.message.key is not None
        return wire.envelope_record(envelope, self._later, None, -1 if keyed else next(self._spread) % partitions)

    # Waiting

    def next_due(self) -> float | None:
        """When something can be claimed that cannot be yet, if nothing else happens."""
        return self._backlog.next_due() if self._stable.is_set() else None

    def _wake(self) -> None:
        for event in self.waiters:
            event.set()

    # Time

    def _tick(self) -> None:
        if self._member is None:
            return
        self._member.alive()
        self._ticker = self._loop.call_later(min(0.25, self.lease / 20), self._tick)
        self._expire()
        if self.commits.last < self._loop.time() - _IDLE_COMMIT and any(
            part.dirty and not part.moving for part in self._parts.values()
        ):
            self.commits.soon()
        if not self.entry.asked.ordered:
            for part in list(self._parts.values()):
                self._mover.make_room(part)

    def _expire(self) -> None:
        """Who did not extend is frozen: others get what it held."""
        now = self._loop.time()
        over = [claim for claim in self._claims if claim.until < now and claim.outcome is None]
        for claim in over:
            self._claims.discard(claim)
            if claim.alive:
                item = claim.item
                item.part.ledger.died(item.offset, started=claim.started)
                item.part.dirty = True
                self._backlog.give_back(item, self._clock.now(), ahead=True)
        if over:
            self.commits.soon()
            self._wake()
            if self._attended < now - self.lease and not self.waiters:
                # Nobody here asks for them.
                self._let_go()

    def _let_go(self) -> None:
        """Leave the group. Whoever asks for messages joins it again, be it at once."""
        if self._member is not None:
            self._member.leave()
            self._stable.clear()

    def _have_moved(self, moved: Sequence[Item], kept: Sequence[Item]) -> None:
        for item in moved:
            self.finish(item)
        for item in kept:
            if item.part.alive:
                self._backlog.give_back(item, self._clock.now(), ahead=False)
        self.commits.soon()

    def _begin_anew(self, part: Part, offset: int) -> Part:
        """Within an epoch offsets rise; where they do not, the log was made anew, and nothing in it is done."""
        logger.warning("%s: partition %d of %s begins anew at %d", self.name, part.number, part.topic, offset)
        self._drop(part)
        anew = self._parts[(part.topic, part.number)] = Part(part.topic, part.number, Ledger(offset))
        return anew

    def _give_up(self, part: Part) -> None:
        self._drop(part)
        self._parts.pop((part.topic, part.number), None)

    def _drop(self, part: Part) -> None:
        """It is somebody else's now: what was handed out of it is lost."""
        for item in list(part.items.values()):
            if item.claim is not None:
                self._claims.discard(item.claim)
            self._backlog.remove(item, self._clock.now())
        part.alive = False
