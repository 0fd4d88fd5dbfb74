"""The broker in a PostgreSQL database."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from postroom.broker.base import PRIORITIES, Broker, Capabilities, Subscription, SubscriptionStats, Topic
from postroom.broker.postgresql import doctor, joining, publish, rows, topology
from postroom.broker.postgresql.address import parse
from postroom.broker.postgresql.bell import Bell, Subs
from postroom.broker.postgresql.consumer import PostgreSQLConsumer
from postroom.broker.postgresql.jobs import PostgreSQLJobStore
from postroom.broker.postgresql.link import Link, alone
from postroom.broker.postgresql.schema import QUEUES
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import BrokerClosed, ConfigurationError, PostroomError, SubscriptionNotFound
from postroom.message import DeadLetter, Message

logger = logging.getLogger("postroom.broker")

_TIDY = 10.0
"""Seconds between removals of what has ended long enough ago, a little more or less in each process."""
_SHORT = 0.01
_STEP = 2000
"""Rows of each kind that one transaction removes or purges."""

_LETTERS = f"SELECT m.dead_at, m.redriven, m.failures, {rows.MESSAGE} FROM ~.message m WHERE m.sub = $1 AND m.state = 3"
_PAGE = f"{_LETTERS} AND (m.dead_at, m.seq) > ($2, $3) ORDER BY m.dead_at, m.seq LIMIT $4"
_NAMED = f"{_LETTERS} AND m.id = ANY ($2::text[]) ORDER BY m.dead_at, m.seq"


class PostgreSQLBroker(Broker):
    """``postgresql://[user:password@]host[:port]/database``. PostgreSQL 13 or newer.

    Options: ``schema`` (``postroom_broker``); ``migrate`` (``never``, or ``auto`` to create and migrate the tables at
    every start); ``pgbouncer`` (``0``, or ``1`` behind a pooler); and those of the client, as ``sslmode``.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="fsync",
        shared=True,
        death_notice=30.0,
        jobs=True,
        transactional_publish=True,
        delay=None,
        priorities=PRIORITIES,
        fifo=True,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=True,
        unique=True,
        known_ids=True,
        start_notes=False,
        expiry=True,
        limits=True,
        exact_stats=True,
        retention=True,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the server's, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        self.address = parse(url)
        self.link = Link(self.address)
        self.clock: Clock = clock or SystemClock()
        self.holder = f"{socket.gethostname()}:{os.getpid()}"
        self._injected = clock is not None
        self._bell = Bell(self.link, self._heard)
        self._jobs = PostgreSQLJobStore(self)
        self._consumers: set[PostgreSQLConsumer] = set()
        self._tidying: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    def moment(self) -> float | None:
        """What the database is told of the time: nothing, it has its own, unless a clock was injected."""
        return self.clock.now() if self._injected else None

    @property
    def hinted(self) -> bool:
        """Whether consumers are told of what others do."""
        return self._bell.listens

    async def connect(self) -> None:
        if self.link.closed:
            raise BrokerClosed("the broker was closed; make a new one")
        await self.link.open()
        try:
            if self.address.migrate:
                await QUEUES.migrate(self.link)
            await QUEUES.check(self.link)
        except BaseException:
            await self.link.close()
            raise

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.wait([self._tidying])
        closing = [consumer.close() for consumer in self._consumers]
        for error in await asyncio.gather(*closing, return_exceptions=True):
            if error is not None:
                # It comes back when its leases end.
                logger.warning("what a consumer holds could not be given back: %s", error)
        await self._bell.close()
        await self.link.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        if topology.changes(await topology.read(self.link), topics, subscriptions):
            await topology.declare(self.link, topics, subscriptions, self.moment())

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        answers, woken = await publish.publish(self.link, messages, self.moment(), self.clock.now())
        self.announce(woken)
        return answers

    async def consume(self, subscription: str, *, lease: float = 30.0) -> PostgreSQLConsumer:
        if lease <= 0:
            raise ConfigurationError(f"consume: lease must be more than 0 seconds, not {lease}")
        consumer = PostgreSQLConsumer(self, subscription, await self._sub(subscription), lease)
        self._consumers.add(consumer)
        self._bell.listen()
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().create_task(self._keep_tidy())
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        found = await self.link.fetch("SELECT * FROM ~.stats($1)", self.moment())
        return [SubscriptionStats(**dict(row)) for row in found]

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        sub = await self._sub(subscription)
        if ids is not None:
            found = await self.link.fetch(_NAMED, sub, list(ids))
        else:
            sql = "SELECT dead_at, seq FROM ~.message WHERE id = $1 AND sub = $2 AND state = 3"
            last = await self.link.fetch(sql, after, sub) if after is not None else []
            found = await self.link.fetch(_PAGE, sub, *(last[0] if last else (-1.0, -1)), limit)
        return [rows.dead_letter(row, subscription) for row in found]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        sub = await self._sub(subscription)
        moved = {row[0] for row in await self.link.fetch("SELECT ~.redrive($1, $2, $3)", sub, ids, self.moment())}
        self.announce([sub])
        return [each for each in dict.fromkeys(ids) if each in moved]

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        sub = await self._sub(subscription)
        gone = {row[0] for row in await self.link.fetch("SELECT ~.discard($1, $2)", sub, ids)}
        return [each for each in dict.fromkeys(ids) if each in gone]

    async def purge(self, subscription: str) -> int:
        sub = await self._sub(subscription)
        newest = await self.link.value("SELECT coalesce(max(seq), 0) FROM ~.message WHERE sub = $1", sub)
        total = 0
        # In steps, for a long queue would hold up everybody else's claims.
        while ended := await self.link.value("SELECT ~.purge($1, $2, $3, $4)", sub, newest, _STEP, self.moment()):
            total += ended
        self.announce([sub])
        return total

    async def unsubscribe(self, subscription: str) -> None:
        await topology.unsubscribe(self.link, subscription, await self._sub(subscription))

    async def replay(self, subscription: str, since: float | None = None) -> int:
        sub = await self._sub(subscription)
        known = await topology.read(self.link)
        count = await self.link.transact(
            lambda connection: topology.replay(self.link, connection, known, subscription, since or 0.0, self.moment())
        )
        self.announce([sub])
        return count

    def joins(self, connection: Any) -> bool:
        return joining.joins(connection, self.address)

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return joining.publish_in(connection, self.address, messages, self.moment(), self.clock.now())

    async def apublish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await joining.apublish_in(connection, self.address, messages, self.moment(), self.clock.now())

    async def plan(self) -> list[str]:
        return await alone(self.address, QUEUES.pending)

    async def migrate(self) -> None:
        await alone(self.address, QUEUES.migrate)

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self.link, QUEUES.version) if self.link.connected else []

    @property
    def jobs(self) -> PostgreSQLJobStore:
        return self._jobs

    def announce(self, subs: Iterable[int] | None = None) -> None:
        """Something may have become ready in these, or anywhere: tell consumers here, and those of other processes."""
        told = {consumer.sub for consumer in self._consumers} if subs is None else set(subs)
        self._heard(frozenset(told))
        self._bell.ring(told)

    def forget(self, consumer: PostgreSQLConsumer) -> None:
        """The consumer is closed."""
        self._consumers.discard(consumer)

    def _heard(self, subs: Subs) -> None:
        for consumer in self._consumers:
            if not subs or consumer.sub in subs:
                consumer.wake()

    async def _sub(self, name: str) -> int:
        found = await self.link.fetch("SELECT id FROM ~.subscription WHERE name = $1", name)
        if not found:
            raise SubscriptionNotFound(f"no queue or subscription {name!r} in {self.address.shown}")
        return int(found[0][0])

    async def _keep_tidy(self) -> None:
        while True:
            removed = 0
            try:
                removed = await self.link.value("SELECT ~.tidy($1, $2)", _STEP, self.moment())
            except PostroomError as error:
                logger.warning("cannot remove what is done now, trying again: %s", error)
            # In small steps: the claims and settles of others come in between.
            await asyncio.sleep(_SHORT if removed else _TIDY * random.uniform(0.8, 1.2))
