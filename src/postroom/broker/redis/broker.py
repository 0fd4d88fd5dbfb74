"""The Redis broker itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import ClassVar

from redis.exceptions import RedisError

from postroom.broker.base import PRIORITIES, Broker, Capabilities, Subscription, SubscriptionStats, Topic
from postroom.broker.redis import doctor, publish, records, retained
from postroom.broker.redis.address import parse
from postroom.broker.redis.consumer import RedisConsumer
from postroom.broker.redis.inlet import Inlet
from postroom.broker.redis.jobs import RedisJobs
from postroom.broker.redis.lifeline import Lifeline
from postroom.broker.redis.link import Gone, Link, end
from postroom.broker.redis.topology import Known, Topology, missing
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import BrokerClosed, ConfigurationError, PostroomError
from postroom.message import DeadLetter, Message

logger = logging.getLogger("postroom.broker")

_BEAT = 1.0
"""Seconds between two signs of life. Whoever gives none for 4 seconds, and is not connected any more, is dead."""


class RedisBroker(Broker):
    """``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS. Redis 7.0 or newer, or Valkey.

    Options: ``namespace`` (``postroom``), ``cluster`` (``no``), and for TLS ``cafile``, ``certfile``, ``keyfile``.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        # With appendfsync=always it survives power loss, too; the doctor tells what the server does.
        durability="process",
        shared=True,
        death_notice=6.0,
        jobs=True,
        transactional_publish=False,
        delay=None,
        priorities=PRIORITIES,
        fifo=True,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=True,
        unique=True,
        known_ids=True,
        start_notes=True,
        expiry=True,
        limits=True,
        exact_stats=True,
        retention=True,
    )

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the server's, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        self._clock: Clock = clock or SystemClock()
        self._link = Link(parse(url), clock)
        self._topology = Topology(self._link)
        self._lifeline = Lifeline(self._link)
        self._inlet = Inlet(self._link, self._topology, self.publish)
        self._jobs = RedisJobs(self._link, self._topology)
        self._consumers: set[RedisConsumer] = set()
        self._beating: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    async def connect(self) -> None:
        if self._link.closed:
            raise BrokerClosed("the broker was closed; make a new one")
        await self._link.open()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        closing = [consumer.close() for consumer in self._consumers]
        for error in await asyncio.gather(*closing, return_exceptions=True):
            if error is not None:
                # It comes back to others once nothing is heard of this process.
                logger.warning("what a consumer holds could not be given back: %s", error)
        await self._inlet.close()
        if self._beating is not None:
            await end(self._beating)
        self._lifeline.close()
        await self._link.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        known = await self._topology.declare(topics, subscriptions)
        for item in subscriptions:
            if records.escape(item.name) in known.filling:
                await self._replay(known, item, None, again=False)
                await self._topology.filled(item.name)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await publish.publish(self._link, self._topology, messages)

    async def consume(self, subscription: str, *, lease: float = 30.0) -> RedisConsumer:
        if lease <= 0:
            raise ConfigurationError(f"consume: lease must be more than 0 seconds, not {lease}")
        item = await self._topology.subscription(subscription)
        await self._lifeline.connect()
        consumer = RedisConsumer(self._link, self._lifeline, self._clock, item, lease, self._consumers.discard)
        await self._beat([consumer])
        self._consumers.add(consumer)
        self._inlet.start()
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._keep_beating())
        return consumer

    async def stats(self) -> list[SubscriptionStats]:
        return await self._topology.using(self._stats)

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        given: tuple[str | int, ...] = (-1,) if ids is None else (len(ids), *ids)
        try:
            told = await self._link.run("letters", records.escape(subscription), after or "", limit, *given)
        except Gone:
            raise missing(subscription) from None
        return [
            records.letter(told[at].decode(), subscription, records.mapping(told[at + 1]))
            for at in range(0, len(told), 2)
        ]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self._move("redrive", subscription, ids)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self._move("discard", subscription, ids)

    async def purge(self, subscription: str) -> int:
        return await self._purge(subscription, delete=False)

    async def unsubscribe(self, subscription: str) -> None:
        known = await self._topology.read()
        # Most of it in steps, so that others get their turn; what is left goes with the declaration.
        await self._purge(subscription, delete=True)
        try:
            await self._link.run("unsubscribe", records.escape(subscription), int(known.is_queue(subscription)))
        except Gone:
            raise missing(subscription) from None

    async def replay(self, subscription: str, since: float | None = None) -> int:
        item = await self._topology.subscription(subscription)
        return await self._replay(await self._topology.read(), item, since, again=True)

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self._link) if self._link.connected else []

    @property
    def jobs(self) -> RedisJobs:
        return self._jobs

    async def _stats(self, known: Known) -> list[SubscriptionStats]:
        items = list(known.subscriptions.values())
        names = [records.escape(item.name) for item in items]
        told = await self._link.run("stats", len(names), *names, version=known.version)
        return [
            SubscriptionStats(
                name=item.name,
                pattern=item.pattern,
                queue=known.is_queue(item.name),
                ready=ready,
                delayed=live - ready - running,
                running=running,
                dead=dead,
                oldest=float(age) if age else None,
            )
            for item, (ready, live, running, dead, age) in zip(items, told, strict=True)
        ]

    async def _move(self, what: str, subscription: str, ids: Sequence[str]) -> list[str]:
        item = await self._topology.subscription(subscription)
        moved: list[str] = []
        for start in range(0, len(ids), publish.BATCH):
            batch = ids[start : start + publish.BATCH]
            try:
                told = await self._link.run(
                    "move", records.escape(subscription), what, int(item.ordered), len(batch), *batch
                )
            except Gone:
                raise missing(subscription) from None
            moved += [message_id.decode() for message_id in told]
        return moved

    async def _purge(self, subscription: str, *, delete: bool) -> int:
        count, at, up_to = 0, b"0", b""
        while at:
            try:
                ended, at, up_to = await self._link.run("purge", records.escape(subscription), at, up_to, int(delete))
            except Gone:
                raise missing(subscription) from None
            count += ended
        return count

    async def _replay(self, known: Known, item: Subscription, since: float | None, *, again: bool) -> int:
        count = 0
        now = self._clock.now()
        try:
            async for page in retained.pages(self._link, known.sources(item), item, since, now):
                if page:
                    count += await publish.replay(self._link, item, page, again=again)
        except Gone:
            raise missing(item.name) from None
        return count

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(_BEAT)
            try:
                await self._beat(list(self._consumers))
            except (PostroomError, RedisError, OSError) as error:
                logger.debug("cannot tell %s that we live, trying again: %s", self._link.address.shown, error)

    async def _beat(self, consumers: Sequence[RedisConsumer]) -> None:
        rows = [text for consumer in consumers for text in (consumer.subscription, consumer.holder)]
        if rows:
            known = await self._link.run("beat", self._lifeline.process, len(consumers), *rows)
            await self._lifeline.connect(anew=not known)
