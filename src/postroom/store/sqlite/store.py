"""The store on one SQLite file, shared by all processes of one machine."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqlite import doctor
from postroom.broker.sqlite import schema as versions
from postroom.broker.sqlite.engine import Engine
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import BrokerUnavailable, ConfigurationError, IdempotencyConflict, PostroomError
from postroom.message import Message
from postroom.store.base import Admission, Again, Claim, End, Store
from postroom.store.records import CANCELLED, DEAD, FOREVER, HOLDS, MEMORY, PURGED, SUCCEEDED, UNCONFIRMED, WAITING
from postroom.store.routing import Routes
from postroom.store.sqlite import claims, routes
from postroom.store.sqlite.jobs import SQLiteStoreJobs
from postroom.store.sqlite.schema import APPLICATION_ID, MIGRATIONS

logger = logging.getLogger("postroom.store")

T = TypeVar("T")

SWEEP = 10.0
"""Seconds between removals of what has ended long enough ago."""
_STEP = 1000

_RECORDED = "SELECT 1 FROM record WHERE id = ? LIMIT 1"
_INSERT = """
INSERT INTO record (id, sub, topic, name, state, due, created_at, finished_at, expires_at, result_ttl, purge_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
_REPLACED = f"""
UPDATE record SET state = {CANCELLED}, finished_at = ?1, purge_at = ?1 + result_ttl WHERE id = ?2 AND state = {WAITING}
"""


class SQLiteStore(Store):
    """``sqlite:///relative.db`` or ``sqlite:////absolute.db``; not the file of a SQLite broker."""

    unique = True

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        """``clock`` replaces the machine's clock, for tests. Raises ``ConfigurationError`` for a malformed URL."""
        scheme, separator, path = url.partition(":///")
        if scheme != "sqlite" or not separator or not path or "?" in path:
            raise ConfigurationError(f"store {url!r}: write sqlite:///relative.db or sqlite:////absolute.db")
        self.engine = Engine(Path(path))
        self._clock: Clock = clock or SystemClock()
        self.jobs = SQLiteStoreJobs(self)
        self._routes = Routes()
        self._sweeping: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Unix time in seconds."""
        return self._clock.now()

    async def connect(self) -> None:
        path = str(self.engine.path)
        self.engine.open(
            partial(versions.check, path=path, migrations=MIGRATIONS, application=APPLICATION_ID),
            partial(versions.prepare, path=path, migrations=MIGRATIONS, application=APPLICATION_ID),
        )
        self._sweeping = asyncio.get_running_loop().create_task(self._keep_sweeping())

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
            self._sweeping = None
        await self.engine.close()

    async def examine(self) -> list[Finding]:
        return await doctor.examine(self.engine, version=len(MIGRATIONS))

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await self._write(lambda connection: routes.declare(connection, topics, subscriptions))

    async def admit(self, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        def run(connection: sqlite3.Connection) -> list[Admission | PostroomError]:
            routes.refresh(connection, self._routes)
            return [self._admit(connection, message) for message in messages]

        return await self._write(run)

    async def confirm(self, ids: Sequence[str]) -> None:
        rows = [(job_id,) for job_id in ids]

        def run(connection: sqlite3.Connection) -> None:
            connection.executemany("UPDATE record SET confirmed = 1 WHERE id = ? AND confirmed = 0", rows)
            connection.executemany("UPDATE dedup SET confirmed = 1 WHERE id = ? AND confirmed = 0", rows)

        await self._write(run)

    async def replaced(self, ids: Sequence[str]) -> None:
        rows = [(self.now(), job_id) for job_id in ids]
        await self._write(lambda connection: connection.executemany(_REPLACED, rows))

    async def withdraw(self, ids: Sequence[str]) -> None:
        def run(connection: sqlite3.Connection) -> None:
            for job_id in ids:
                gone = connection.execute(
                    f"DELETE FROM record WHERE id = ? AND confirmed = 0 AND copy IS NULL AND state IN ({WAITING}, "
                    f"{SUCCEEDED})",
                    (job_id,),
                )
                if gone.rowcount:
                    connection.execute("DELETE FROM dedup WHERE id = ?", (job_id,))

        await self._write(run)

    async def deliver(self, given: Sequence[Claim]) -> list[End | None]:
        now = self.now()
        return await self._write(lambda connection: [claims.deliver(connection, now, claim) for claim in given])

    async def finish(self, ends: Sequence[tuple[Claim, End]]) -> list[bool]:
        now = self.now()
        return await self._write(lambda connection: [claims.finish(connection, now, *end) for end in ends])

    async def buried(self, given: Sequence[Claim]) -> None:
        rows = [(claim.message.id, claim.subscription, claim.token) for claim in given]
        await self._write(
            lambda connection: connection.executemany(
                "UPDATE record SET buried = 1 WHERE id = ? AND sub = ? AND token = ?", rows
            )
        )

    async def again(self, given: Sequence[tuple[Claim, Again]]) -> None:
        now = self.now()

        def run(connection: sqlite3.Connection) -> None:
            for claim, how in given:
                claims.again(connection, now, claim, how)

        await self._write(run)

    async def redriving(self, subscription: str, ids: Sequence[str]) -> None:
        await self._each(
            f"UPDATE record SET buried = 1 WHERE id = ?1 AND sub = ?2 AND state = {DEAD}", subscription, ids
        )

    async def redriven(self, subscription: str, ids: Sequence[str]) -> None:
        sql = f"""
        UPDATE record SET state = {WAITING}, attempt = 1, buried = 0, due = ?3, token = NULL, finished_at = NULL,
            expires_at = NULL, purge_at = NULL WHERE id = ?1 AND sub = ?2 AND state = {DEAD}
        """
        await self._each(sql, subscription, ids, self.now())

    async def discarded(self, subscription: str, ids: Sequence[str]) -> None:
        sql = f"UPDATE record SET purge_at = ?3 + result_ttl WHERE id = ?1 AND sub = ?2 AND state = {DEAD}"
        await self._each(sql, subscription, ids, self.now())

    async def purged(self, subscription: str, before: float) -> None:
        await self._write(
            lambda connection: connection.execute(
                f"UPDATE record SET state = {PURGED}, finished_at = ?1, purge_at = ?1 + result_ttl "
                f"WHERE sub = ?2 AND state = {WAITING} AND created_at <= ?3",
                (self.now(), subscription, before),
            )
        )

    async def unsubscribed(self, subscription: str) -> None:
        def run(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM record WHERE sub = ?", (subscription,))
            routes.forget(connection, subscription)

        await self._write(run)

    def _admit(self, connection: sqlite3.Connection, message: Message) -> Admission | PostroomError:
        job_id, replaces = message.id, None
        if message.idempotency_key is not None:
            known = self._first_with_key(connection, message)
            if isinstance(known, PostroomError) or not known.publish:
                return known
            job_id, replaces = known.id, known.replaces
        now = self.now()
        due = max(now, message.not_before or now)
        forgotten = None if message.expires_at is None else message.expires_at + message.result_ttl
        subs = self._routes.subscriptions(message)
        for sub in subs:
            row = (WAITING, due, message.created_at, None, message.expires_at, message.result_ttl, forgotten)
            connection.execute(_INSERT, (job_id, sub, message.topic, message.name, *row))
        if not subs:
            unwanted = (SUCCEEDED, due, message.created_at, now, None, message.result_ttl, now + message.result_ttl)
            connection.execute(_INSERT, (job_id, "", message.topic, message.name, *unwanted))
        found = connection.execute("SELECT max(confirmed OR copy IS NOT NULL) FROM record WHERE id = ?", (job_id,))
        return Admission(job_id, publish=not found.fetchone()[0], replaces=replaces)

    def _first_with_key(self, connection: sqlite3.Connection, message: Message) -> Admission | PostroomError:
        """The message its key leads to, from now on at least."""
        # What two messages under one key must share.
        fingerprint = hashlib.sha256(message.name.encode() + b"\0" + message.body).digest()
        now = self.now()
        found = connection.execute(
            "SELECT id, fingerprint, confirmed FROM dedup WHERE topic = ? AND key = ? AND until > ?",
            (message.topic, message.idempotency_key, now),
        ).fetchone()
        replaces = None
        if found is not None and message.unique is not None:
            held = self._holds(connection, found[0], message)
            replaces = found[0] if held and message.replace and found[0] != message.id else None
            if replaces is not None and connection.execute(_RECORDED, (message.id,)).fetchone():
                # Published before: what came after it keeps the key.
                return Admission(message.id, publish=True)
            found = found if held and replaces is None else None
        if found is None:
            until = FOREVER if message.unique is not None else now + message.dedup_window
            connection.execute(
                "INSERT OR REPLACE INTO dedup VALUES (?, ?, ?, ?, ?, 0)",
                (message.topic, message.idempotency_key, message.id, fingerprint, until),
            )
            return Admission(message.id, publish=True, replaces=replaces)
        first, known, confirmed = found
        if known != fingerprint:
            return IdempotencyConflict(
                f"idempotency key {message.idempotency_key!r} was used for another payload (job {first})"
            )
        return Admission(first, publish=not confirmed)

    def _holds(self, connection: sqlite3.Connection, job_id: str, message: Message) -> bool:
        """Whether the message of this id keeps a unique one out."""
        sql = f"SELECT 1 FROM record WHERE id = ?1 AND {HOLDS[message.unique].format(now='?2')} LIMIT 1"
        return connection.execute(sql, (job_id, self.now())).fetchone() is not None

    async def _each(self, sql: str, subscription: str, ids: Sequence[str], *more: float) -> None:
        rows = [(job_id, subscription, *more) for job_id in ids]
        await self._write(lambda connection: connection.executemany(sql, rows))

    async def _write(self, run: Callable[[sqlite3.Connection], T]) -> T:
        return await self.engine.write(run)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await self.engine.write(self.sweep)
            except BrokerUnavailable as error:
                logger.warning("cannot remove old records now: %s", error)

    def sweep(self, connection: sqlite3.Connection) -> None:
        """Remove some of what has ended long enough ago, in the open transaction."""
        now = self.now()
        for ended, before in (
            ("purge_at <= ?", now - MEMORY),
            (f"confirmed = 0 AND created_at <= ? AND state = {WAITING}", now - UNCONFIRMED),
        ):
            gone = connection.execute(
                f"DELETE FROM record WHERE seq IN (SELECT seq FROM record WHERE {ended} LIMIT ?) RETURNING id",
                (before, _STEP),
            ).fetchall()
            # Keys held by unique messages have no window: they go with what held them.
            connection.executemany("DELETE FROM dedup WHERE id = ? AND until = 9e999", gone)
        connection.execute(
            "DELETE FROM dedup WHERE (topic, key) IN (SELECT topic, key FROM dedup WHERE until <= ? LIMIT ?)",
            (now, _STEP),
        )
