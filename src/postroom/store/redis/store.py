"""The store in Redis: each change of records is one script, and none overwrites what it has not seen."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from postroom.broker.base import Subscription, Topic
from postroom.broker.redis import doctor
from postroom.broker.redis.address import parse
from postroom.broker.redis.link import Link, Stale, end
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import IdempotencyConflict, PostroomError
from postroom.message import Message
from postroom.store.base import Admission, Again, Claim, End, Store
from postroom.store.records import DEAD, PURGED, SUCCEEDED, WAITING
from postroom.store.redis.jobs import RedisStoreJobs
from postroom.store.redis.rows import HELD_BY, PAGE, Place, Row, Rows, encode, forget_text, fresh, mark, place_of
from postroom.store.routing import Routes
from postroom.store.routing import encode as declaration

logger = logging.getLogger("postroom.store")

SWEEP = 10.0
"""Seconds between removals of what has ended long enough ago."""
_KEPT = 3600.0
"""Seconds for which the server keeps an idempotency key beyond its window, as clocks differ."""


class RedisStore(Store):
    """``redis://host``, with the options of the broker of that name; keys begin with ``{namespace}:store:``."""

    unique = True

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the machine's clock, for tests. Raises ``ConfigurationError``."""
        self._link = Link(parse(url), None, package="postroom.store.redis", area="store:")
        self._clock: Clock = clock or SystemClock()
        self._routes = Routes()
        self._sweeping: asyncio.Task[None] | None = None
        self.rows = Rows(self._link)
        self.jobs = RedisStoreJobs(self)

    def now(self) -> float:
        """Unix time in seconds."""
        return self._clock.now()

    async def connect(self) -> None:
        await self._link.open()
        self._sweeping = asyncio.get_running_loop().create_task(self._keep_sweeping())

    async def close(self) -> None:
        if self._sweeping is not None:
            await end(self._sweeping)
            self._sweeping = None
        await self._link.close()

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self._link) if self._link.connected else []

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        fields = [(f"queue:{topic.name}", "1") for topic in topics if topic.queue]
        fields += [(f"sub:{subscription.name}", declaration(subscription)) for subscription in subscriptions]
        await self._link.run("declare", len(fields), *(part for field in fields for part in field))

    async def admit(self, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        while True:
            if self._routes.version < 0:
                await self._learn()
            try:
                return await self._admit(messages)
            except Stale:
                self._routes.version = -1

    async def confirm(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), PAGE):
            page = ids[start : start + PAGE]
            await self._link.run("confirm", mark(), len(page), *page)

    async def replaced(self, ids: Sequence[str]) -> None:
        now = self.now()

        def cancel(_: Place, row: Row | None) -> Row | None:
            if row is None or row.record.state != WAITING:
                return None
            row.record.cancel_now(now)
            return row

        places = [Place(job_id, sub) for job_id in ids for sub in await self.subscriptions_of(job_id)]
        await self.rows.change(places, cancel)

    async def withdraw(self, ids: Sequence[str]) -> None:
        await self._link.run("withdraw", f"{WAITING}{SUCCEEDED}", len(ids), *ids)

    async def deliver(self, given: Sequence[Claim]) -> list[End | None]:
        now = self.now()
        return await self._claimed(given, lambda row, claim, _: row.record.deliver(claim, now), None, foreign=True)

    async def finish(self, ends: Sequence[tuple[Claim, End]]) -> list[bool]:
        now = self.now()
        claims = [claim for claim, _ in ends]
        return await self._claimed(claims, lambda row, claim, at: row.record.finish(claim, ends[at][1], now), False)

    async def buried(self, given: Sequence[Claim]) -> None:
        def bury(row: Row, claim: Claim, at: int) -> None:
            row.record.buried |= row.record.token == claim.token

        await self._claimed(given, bury, None)

    async def again(self, given: Sequence[tuple[Claim, Again]]) -> None:
        now = self.now()
        claims = [claim for claim, _ in given]
        await self._claimed(claims, lambda row, claim, at: row.record.again(claim, given[at][1], now), None)

    async def redriving(self, subscription: str, ids: Sequence[str]) -> None:
        await self._dead(subscription, ids, lambda row: {"buried": True})

    async def redriven(self, subscription: str, ids: Sequence[str]) -> None:
        begun = {"state": WAITING, "attempt": 1, "buried": False, "due": self.now()}
        ended = dict.fromkeys(("token", "finished_at", "expires_at", "purge_at"))
        await self._dead(subscription, ids, lambda row: begun | ended)

    async def discarded(self, subscription: str, ids: Sequence[str]) -> None:
        now = self.now()
        await self._dead(subscription, ids, lambda row: {"purge_at": now + row.record.result_ttl})

    async def purged(self, subscription: str, before: float) -> None:
        now = self.now()

        def purge(_: Place, row: Row | None) -> Row | None:
            if row is None or row.record.state != WAITING or row.created_at > before:
                return None
            row.record.state, row.record.finished_at, row.record.purge_at = PURGED, now, now + row.record.result_ttl
            return row

        async for places in self.newest(subscription):
            await self.rows.change(places, purge)

    async def unsubscribed(self, subscription: str) -> None:
        await self._link.run("forget", subscription)
        async for places in self.newest(subscription):
            await self.rows.remove(places)

    async def newest(self, subscription: str | None) -> AsyncIterator[list[Place]]:
        """Where the records are, page by page, those that came last first."""
        key = self._link.key("order") if subscription is None else self._link.key("order", subscription)
        before: str | float = "+inf"
        while True:
            with self._link.using() as client:
                found = await client.zrevrangebyscore(key, before, "-inf", start=0, num=PAGE, withscores=True)
            if not found:
                return
            before = f"({found[-1][1]:.0f}"
            members = [member for member, _ in found]
            if subscription is None:
                yield [place_of(member) for member in members]
            else:
                yield [Place(member.decode(), subscription) for member in members]

    async def subscriptions_of(self, job_id: str) -> list[str]:
        """Those that have a record of it."""
        with self._link.using() as client:
            fields = await client.hkeys(self._link.key("record", job_id))
        return [field.decode() for field in fields if field != b"*"]

    async def sweep(self) -> None:
        """Remove what has ended long enough ago."""
        now = self.now()
        while True:
            with self._link.using() as client:
                over = await client.zrangebyscore(self._link.key("ends"), "-inf", now, start=0, num=PAGE)
                missing = await self.rows.tidy([place_of(member) for member in over], now)
                if missing:
                    # A server that makes room by itself has dropped them.
                    await client.zrem(self._link.key("ends"), *(f"{place.sub}:{place.id}" for place in missing))
            if len(over) < PAGE:
                return

    async def _admit(self, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        admitted: list[Admission | PostroomError] = []
        for start in range(0, len(messages), PAGE):
            page = messages[start : start + PAGE]
            arguments = [part for message in page for part in self._admission(message)]
            told = await self._link.run(
                "admit", repr(self.now()), *HELD_BY, len(page), *arguments, version=str(self._routes.version)
            )
            for message, verdict, job_id, replaces in zip(page, told[::3], told[1::3], told[2::3], strict=True):
                first = job_id.decode()
                if verdict == b"x":
                    key = message.idempotency_key
                    conflict = f"idempotency key {key!r} was used for another payload (job {first})"
                    admitted.append(IdempotencyConflict(conflict))
                else:
                    admitted.append(Admission(first, publish=verdict == b"1", replaces=replaces.decode() or None))
        return admitted

    def _admission(self, message: Message) -> list[Any]:
        """Its part of the script's arguments."""
        made: list[Any] = [message.id, "", "", "", "", "", ""]
        if message.idempotency_key is not None:
            # What two messages under one key must share.
            fingerprint = hashlib.sha256(message.name.encode() + b"\0" + message.body).digest()
            kept = int((message.dedup_window + _KEPT) * 1000)
            place = f"{message.topic}:{message.idempotency_key}"
            made[1:] = (
                place,
                fingerprint,
                repr(message.dedup_window),
                kept,
                message.unique or "",
                int(message.replace),
            )
        now, ttl = self.now(), message.result_ttl
        due, expires = max(now, message.not_before or now), message.expires_at
        head = (message.topic, message.name, message.created_at)
        subs = self._routes.subscriptions(message)
        made.append(len(subs) or 1)
        for sub in subs:
            purge = None if expires is None else expires + ttl
            row = fresh(*head, due=due, result_ttl=ttl, expires_at=expires, purge_at=purge)
            made += (sub, encode(row), forget_text(row))
        if not subs:
            row = fresh(*head, due=due, result_ttl=ttl, state=SUCCEEDED, finished_at=now, purge_at=now + ttl)
            made += ("", encode(row), forget_text(row))
        return made

    async def _learn(self) -> None:
        with self._link.using() as client:
            stored = await client.hgetall(self._link.key("topology"))
        fields = {name.decode(): value.decode() for name, value in stored.items()}
        queues = [name.removeprefix("queue:") for name in fields if name.startswith("queue:")]
        declared = [fields[name] for name in sorted(fields) if name.startswith("sub:")]
        self._routes.update(int(fields.get("version", "0")), queues, declared)

    async def _claimed(
        self, claims: Sequence[Claim], use: Callable[[Row, Claim, int], Any], otherwise: Any, *, foreign: bool = False
    ) -> list[Any]:
        """What ``use(row, claim, number)`` answers for each. ``foreign``: begin a record where there is none."""
        by_place: dict[Place, list[int]] = {}
        for at, claim in enumerate(claims):
            by_place.setdefault(Place(claim.message.id, claim.subscription), []).append(at)
        answers: list[Any] = [otherwise] * len(claims)

        def decide(place: Place, row: Row | None) -> Row | None:
            if row is None and foreign:
                row = _foreign(claims[by_place[place][0]].message)
            if row is not None:
                for at in by_place[place]:
                    answers[at] = use(row, claims[at], at)
            return row

        await self.rows.change(by_place, decide)
        return answers

    async def _dead(self, subscription: str, ids: Sequence[str], changes: Callable[[Row], dict[str, Any]]) -> None:
        def decide(_: Place, row: Row | None) -> Row | None:
            if row is None or row.record.state != DEAD:
                return None
            for name, value in changes(row).items():
                setattr(row.record, name, value)
            return row

        await self.rows.change([Place(job_id, subscription) for job_id in ids], decide)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await self.sweep()
            except PostroomError as error:
                logger.warning("cannot remove old records now: %s", error)


def _foreign(message: Message) -> Row:
    """Of a message that was published without this store."""
    return fresh(
        message.topic, message.name, message.created_at,
        due=message.not_before or message.created_at,
        result_ttl=message.result_ttl,
        expires_at=message.expires_at,
        confirmed=True,
    )  # fmt: skip
