"""The store in PostgreSQL. Each method is one transaction; its statements take whole batches."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Any, TypeVar

from postroom.broker.base import Subscription, Topic
from postroom.broker.postgresql import doctor
from postroom.broker.postgresql.address import parse
from postroom.broker.postgresql.link import Link, alone
from postroom.broker.postgresql.schema import Schema
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import BrokerUnavailable, IdempotencyConflict, PostroomError
from postroom.message import Message
from postroom.store.base import Admission, Again, Claim, End, Store
from postroom.store.postgresql import claims
from postroom.store.postgresql.jobs import PostgreSQLStoreJobs
from postroom.store.postgresql.session import Session
from postroom.store.records import CANCELLED, DEAD, HOLDS, MEMORY, PURGED, SUCCEEDED, UNCONFIRMED, WAITING
from postroom.store.routing import Routes, encode

logger = logging.getLogger("postroom.store")

T = TypeVar("T")

SWEEP = 10.0
"""Seconds between removals of what has ended long enough ago."""
SCHEMA = "postroom_store"
"""The schema of the database in which the tables are, unless the URL names another."""
TABLES = Schema("postroom.store.postgresql", (("tables",),), "postroom migrate --store")
_STEP = 5000

_INSERT = """
INSERT INTO ~.record (id, sub, topic, name, state, due, created_at, finished_at, expires_at, result_ttl, purge_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING
"""
_KNOWN = "SELECT id, bool_or(confirmed OR copy IS NOT NULL) FROM ~.record WHERE id = ANY($1::text[]) GROUP BY id"
_KEY = """
INSERT INTO ~.dedup AS known VALUES ($1, $2, $3, $4, $5, false) ON CONFLICT (topic, key) DO UPDATE
SET id = excluded.id, fingerprint = excluded.fingerprint, until = excluded.until, confirmed = false
WHERE known.until <= $6 RETURNING id
"""
_HOLD = """
INSERT INTO ~.dedup VALUES ($1, $2, $3, $4, 'Infinity', false) ON CONFLICT DO NOTHING RETURNING id
"""
_TAKE = """
UPDATE ~.dedup SET id = $3, fingerprint = $4, until = 'Infinity', confirmed = false WHERE topic = $1 AND key = $2
"""
_REPLACED = f"""
UPDATE ~.record SET state = {CANCELLED}, finished_at = $2, purge_at = $2 + result_ttl
WHERE id = ANY($1::text[]) AND state = {WAITING}
"""


class PostgreSQLStore(Store):
    """``postgresql://[user:password@]host[:port]/database``, with the options of the broker of that name.

    Its tables are in the schema ``postroom_store``, unless ``?schema=`` names another; ``postroom migrate`` makes them.
    """

    unique = True

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the machine's clock, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        self._link = Link(parse(url, SCHEMA))
        self._clock: Clock = clock or SystemClock()
        self._routes = Routes()
        self._sweeping: asyncio.Task[None] | None = None
        self.jobs = PostgreSQLStoreJobs(self)

    def now(self) -> float:
        """Unix time in seconds."""
        return self._clock.now()

    async def connect(self) -> None:
        await self._link.open()
        try:
            if self._link.address.migrate:
                await TABLES.migrate(self._link)
            await TABLES.check(self._link)
        except BaseException:
            await self._link.close()
            raise
        self._sweeping = asyncio.get_running_loop().create_task(self._keep_sweeping())

    async def plan(self) -> list[str]:
        return await alone(self._link.address, TABLES.pending)

    async def migrate(self) -> None:
        await alone(self._link.address, TABLES.migrate)

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
            self._sweeping = None
        await self._link.close()

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self._link, TABLES.version) if self._link.connected else []

    async def transact(self, run: Callable[[Session], Awaitable[T]]) -> T:
        """Run ``run(session)`` in a transaction, once more if another was in its way.

        Raises ``BrokerClosed`` or ``BrokerUnavailable``.
        """
        return await self._link.transact(lambda connection: run(Session(self._link, connection)))

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        queues = sorted(topic.name for topic in topics if topic.queue)
        declared = sorted((subscription.name, encode(subscription)) for subscription in subscriptions)

        async def run(session: Session) -> None:
            # Taken first, so that two who declare at once do not wait for each other.
            await session.execute("SELECT value FROM ~.meta WHERE key = 'topology' FOR UPDATE")
            changed = await session.fetch(
                "INSERT INTO ~.queue SELECT unnest($1::text[]) ON CONFLICT DO NOTHING RETURNING 1", queues
            )
            for name, text in declared:
                changed += await session.fetch(
                    "INSERT INTO ~.subscription AS s VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET declared = $2 "
                    "WHERE s.declared != $2 RETURNING 1",
                    name,
                    text,
                )
            if changed:
                await session.execute("UPDATE ~.meta SET value = value + 1 WHERE key = 'topology'")

        await self.transact(run)

    async def admit(self, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        return await self.transact(lambda session: self._admit(session, messages))

    async def confirm(self, ids: Sequence[str]) -> None:
        async def run(session: Session) -> None:
            for table in ("record", "dedup"):
                await session.execute(
                    f"UPDATE ~.{table} SET confirmed = true WHERE id = ANY($1::text[]) AND NOT confirmed", sorted(ids)
                )

        await self.transact(run)

    async def replaced(self, ids: Sequence[str]) -> None:
        await self.transact(lambda session: session.execute(_REPLACED, sorted(ids), self.now()))

    async def withdraw(self, ids: Sequence[str]) -> None:
        async def run(session: Session) -> None:
            gone = await session.fetch(
                "DELETE FROM ~.record WHERE id = ANY($1::text[]) AND NOT confirmed AND copy IS NULL "
                f"AND state IN ({WAITING}, {SUCCEEDED}) RETURNING id",
                sorted(ids),
            )
            await session.execute("DELETE FROM ~.dedup WHERE id = ANY($1::text[])", [row[0] for row in gone])

        await self.transact(run)

    async def deliver(self, given: Sequence[Claim]) -> list[End | None]:
        now = self.now()
        return await self.transact(lambda session: claims.deliver(session, now, given))

    async def finish(self, ends: Sequence[tuple[Claim, End]]) -> list[bool]:
        now = self.now()
        return await self.transact(lambda session: claims.finish(session, now, ends))

    async def buried(self, given: Sequence[Claim]) -> None:
        rows = [(claim.message.id, claim.subscription, claim.token) for claim in given]
        sql = "UPDATE ~.record SET buried = true WHERE id = $1 AND sub = $2 AND token = $3"
        await self.transact(lambda session: session.executemany(sql, sorted(rows)))

    async def again(self, given: Sequence[tuple[Claim, Again]]) -> None:
        now = self.now()
        await self.transact(lambda session: claims.again(session, now, given))

    async def redriving(self, subscription: str, ids: Sequence[str]) -> None:
        await self._each(
            f"SET buried = true WHERE sub = $1 AND id = ANY($2::text[]) AND state = {DEAD}", subscription, ids
        )

    async def redriven(self, subscription: str, ids: Sequence[str]) -> None:
        sql = f"""
        SET state = {WAITING}, attempt = 1, buried = false, due = $3, token = NULL, finished_at = NULL,
            expires_at = NULL, purge_at = NULL WHERE sub = $1 AND id = ANY($2::text[]) AND state = {DEAD}
        """
        await self._each(sql, subscription, ids, self.now())

    async def discarded(self, subscription: str, ids: Sequence[str]) -> None:
        sql = f"SET purge_at = $3 + result_ttl WHERE sub = $1 AND id = ANY($2::text[]) AND state = {DEAD}"
        await self._each(sql, subscription, ids, self.now())

    async def purged(self, subscription: str, before: float) -> None:
        sql = (
            f"UPDATE ~.record SET state = {PURGED}, finished_at = $1, purge_at = $1 + result_ttl "
            f"WHERE sub = $2 AND state = {WAITING} AND created_at <= $3"
        )
        await self.transact(lambda session: session.execute(sql, self.now(), subscription, before))

    async def unsubscribed(self, subscription: str) -> None:
        async def run(session: Session) -> None:
            await session.execute("DELETE FROM ~.record WHERE sub = $1", subscription)
            await session.execute("DELETE FROM ~.subscription WHERE name = $1", subscription)
            await session.execute("UPDATE ~.meta SET value = value + 1 WHERE key = 'topology'")

        await self.transact(run)

    async def sweep(self) -> None:
        """Remove some of what has ended long enough ago."""
        now = self.now()

        async def run(session: Session) -> None:
            for table, ended, bindings in (
                ("record", "purge_at <= $1", (now - MEMORY,)),
                ("record", f"NOT confirmed AND created_at <= $1 AND state = {WAITING}", (now - UNCONFIRMED,)),
                ("dedup", "until <= $1", (now,)),
            ):
                # Those that another process just uses can wait; so can the sweep of another.
                chosen = f"SELECT ctid FROM ~.{table} WHERE {ended} LIMIT {_STEP} FOR UPDATE SKIP LOCKED"
                sql = f"DELETE FROM ~.{table} WHERE ctid = ANY(ARRAY({chosen})) RETURNING id"
                gone = [row[0] for row in await session.fetch(sql, *bindings)]
                if table == "record":
                    # Keys held by unique messages have no window: they go with what held them.
                    await session.execute(
                        "DELETE FROM ~.dedup WHERE id = ANY($1::text[]) AND until = 'Infinity'", sorted(gone)
                    )

        await self.transact(run)

    async def _admit(self, session: Session, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        await self._refresh(session)
        verdicts: dict[int, Admission | PostroomError] = {}
        # In one order everywhere: two batches with the same keys must not wait for each other.
        keyed = [(m.topic, m.idempotency_key, n) for n, m in enumerate(messages) if m.idempotency_key is not None]
        for _, _, number in sorted(keyed):
            earlier = {verdict.id for verdict in verdicts.values() if isinstance(verdict, Admission)}
            verdicts[number] = await self._first_with_key(session, messages[number], earlier)
        rows: list[tuple[Any, ...]] = []
        ids: dict[int, str] = {}
        for number, message in enumerate(messages):
            verdict = verdicts.get(number, Admission(message.id, publish=True))
            if isinstance(verdict, Admission) and verdict.publish:
                ids[number] = verdict.id
                rows += self._rows(message, verdict.id)
            else:
                verdicts[number] = verdict
        if rows:
            await session.executemany(_INSERT, sorted(rows, key=lambda row: row[:2]))
            known = dict(await session.fetch(_KNOWN, sorted(set(ids.values()))))
            for n, job_id in ids.items():
                before = verdicts.get(n)
                replaces = before.replaces if isinstance(before, Admission) else None
                verdicts[n] = Admission(job_id, publish=not known.get(job_id, False), replaces=replaces)
        return [verdicts[number] for number in range(len(messages))]

    def _rows(self, message: Message, job_id: str) -> list[tuple[Any, ...]]:
        now = self.now()
        due, ttl = max(now, message.not_before or now), message.result_ttl
        head = (message.topic, message.name)
        forgotten = None if message.expires_at is None else message.expires_at + ttl
        subs = self._routes.subscriptions(message)
        if not subs:
            return [(job_id, "", *head, SUCCEEDED, due, message.created_at, now, None, ttl, now + ttl)]
        tail = (WAITING, due, message.created_at, None, message.expires_at, ttl, forgotten)
        return [(job_id, sub, *head, *tail) for sub in subs]

    async def _first_with_key(self, session: Session, message: Message, earlier: Set[str]) -> Admission | PostroomError:
        """The message its key leads to, from now on at least. Waits for another that is just being admitted.

        ``earlier``: ids of this batch, which have no records yet.
        """
        # What two messages under one key must share.
        fingerprint = hashlib.sha256(message.name.encode() + b"\0" + message.body).digest()
        now = self.now()
        place = (message.topic, message.idempotency_key)
        if message.unique is not None:
            taken = await self._take_key(session, message, fingerprint, earlier)
            if taken is not None:
                return taken
        elif await session.value(_KEY, *place, message.id, fingerprint, now + message.dedup_window, now):
            return Admission(message.id, publish=True)
        first, known, confirmed = await session.row(
            "SELECT id, fingerprint, confirmed FROM ~.dedup WHERE topic = $1 AND key = $2", *place
        )
        if known != fingerprint:
            return IdempotencyConflict(
                f"idempotency key {message.idempotency_key!r} was used for another payload (job {first})"
            )
        return Admission(first, publish=not confirmed)

    async def _take_key(
        self, session: Session, message: Message, fingerprint: bytes, earlier: Set[str]
    ) -> Admission | None:
        """Let a unique message hold its key, if no other does or it is to be replaced."""
        place = (message.topic, message.idempotency_key)
        first = None
        while first is None:
            if await session.value(_HOLD, *place, message.id, fingerprint):
                return Admission(message.id, publish=True)
            # Swept in between: then it can be held after all.
            sql = "SELECT id FROM ~.dedup WHERE topic = $1 AND key = $2 FOR UPDATE"
            first = await session.value(sql, *place)
        held = f"SELECT 1 FROM ~.record WHERE id = $1 AND {HOLDS[message.unique].format(now='$2')} LIMIT 1"
        holds = first in earlier or await session.value(held, first, self.now()) is not None
        if holds and (not message.replace or first == message.id):
            return None
        recorded = "SELECT 1 FROM ~.record WHERE id = $1 LIMIT 1"
        if holds and (message.id in earlier or await session.value(recorded, message.id)):
            # Published before: what came after it keeps the key.
            return Admission(message.id, publish=True)
        await session.execute(_TAKE, *place, message.id, fingerprint)
        return Admission(message.id, publish=True, replaces=first if holds else None)

    async def _refresh(self, session: Session) -> None:
        """Read the topology again if another process has declared something."""
        version = await session.value("SELECT value FROM ~.meta WHERE key = 'topology'")
        if version != self._routes.version:
            queues = [row[0] for row in await session.fetch("SELECT name FROM ~.queue")]
            declared = [row[0] for row in await session.fetch("SELECT declared FROM ~.subscription ORDER BY name")]
            self._routes.update(version, queues, declared)

    async def _each(self, change: str, subscription: str, ids: Sequence[str], *more: float) -> None:
        await self.transact(
            lambda session: session.execute(f"UPDATE ~.record {change}", subscription, list(ids), *more)
        )

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await self.sweep()
            except BrokerUnavailable as error:
                logger.warning("cannot remove old records now: %s", error)
