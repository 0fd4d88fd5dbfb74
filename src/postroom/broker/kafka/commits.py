"""Commits: one at a time, each for all who waited for the one before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from postroom.broker.kafka.backlog import Part
from postroom.broker.kafka.faults import GONE, error_of, unavailable
from postroom.broker.kafka.member import Member
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place
from postroom.errors import BrokerUnavailable

_PASSING = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError._WAIT_COORD,
}


class Commits:
    """What the ledgers of ``parts`` say, made durable. Lives on the event loop."""

    def __init__(
        self, options: Options, member: Member, parts: Mapping[Place, Part], tag: str, lost: Callable[[Part], None]
    ) -> None:
        """``lost(part)``: the group says that it is no longer ours."""
        self._options = options
        self._member = member
        self._parts = parts
        self._tag = tag
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Future[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self.last = 0.0
        """When the group last said yes, by the loop's clock."""

    async def flush(self, *, check: bool = False) -> None:
        """All that was noted until now is durable on return. ``check``: and the group has not given us up.

        Raises ``BrokerUnavailable``. What was lost meanwhile is no longer ``alive``.
        """
        if check and self._loop.time() - self.last > self._options.session / 4:
            for part in self._parts.values():
                part.dirty = True
        await asyncio.shield(self.soon())

    def soon(self) -> asyncio.Future[None]:
        """The same, without waiting for it."""
        if self._next is None:
            self._next = self._loop.create_future()
            if self._running is None or self._running.done():
                self._running = self._loop.create_task(self._run())
        return self._next

    def place_of(self, part: Part, *, released: bool = False) -> TopicPartition:
        """What is committed of a partition. ``released``: as if nothing were handed out."""
        assert part.ledger.prefix is not None
        part.committed = True
        text = part.ledger.text(self._tag, released=released)
        return TopicPartition(part.topic, part.number, part.ledger.prefix, text)

    async def _run(self) -> None:
        while self._next is not None:
            await asyncio.sleep(0)  # Whoever else settles in this turn of the loop shares this commit.
            waiting, self._next = self._next, None
            try:
                await self._commit()
                waiting.set_result(None)
            except Exception as error:
                waiting.set_exception(error)
                waiting.exception()  # Perhaps nobody waits for it.

    async def _commit(self) -> None:
        deadline = self._loop.time() + self._options.session + self._options.timeout
        while True:
            while any(part.dirty and part.moving for part in self._parts.values()):
                if self._loop.time() > deadline:
                    raise BrokerUnavailable("the consumer group does not come to rest; try again later")
                await asyncio.sleep(0.02)
            parts = [part for part in self._parts.values() if part.dirty and part.ledger.prefix is not None]
            if not parts:
                return
            places = [self.place_of(part) for part in parts]
            for part in parts:
                part.dirty = False
            try:
                await self._member.commit(places)
                self.last = self._loop.time()
                return
            except KafkaException as error:
                self._failed(parts, error, self._loop.time() > deadline)
            await asyncio.sleep(0.05)

    def _failed(self, parts: list[Part], error: KafkaException, late: bool) -> None:
        """Returns if another try is worth it."""
        code = error_of(error).code()
        for part in parts:
            part.dirty = True
        # A rebalance that has begun meanwhile decides itself who has what.
        for part in [part for part in parts if code in GONE and part.alive and not part.moving]:
            self._lost(part)
        if late or code not in GONE | _PASSING:
            raise unavailable("cannot commit", error_of(error)) from error
