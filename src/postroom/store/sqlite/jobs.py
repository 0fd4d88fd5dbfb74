"""Status and results, read by people and producers."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.message import JobRecord, JobState, Progress
from postroom.store import records
from postroom.store.base import CancelAnswer, JobStore
from postroom.store.records import RUNNING, SELECT, WHERE
from postroom.store.sqlite import claims

if TYPE_CHECKING:
    from postroom.store.sqlite.store import SQLiteStore


class SQLiteStoreJobs(JobStore):
    """Made by ``SQLiteStore.jobs``."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store

    async def get(self, job_id: str) -> list[JobRecord]:
        return self._read(f"{SELECT} AND id = ?2 ORDER BY sub", (job_id,))

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        conditions = [SELECT]
        bindings: tuple[Any, ...] = (limit,)
        if subscription is not None:
            conditions.append("sub = ?3")
            bindings = (limit, subscription)
        if state is not None:
            conditions.append(WHERE[state])
        return self._read(f"{' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?2", bindings)

    async def cancel(self, job_id: str) -> CancelAnswer:
        return await self._store.engine.write(lambda connection: self._cancel(connection, job_id))

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        rows = [
            (msgspec.json.encode(progress).decode(), delivery.message.id, delivery.subscription, delivery.receipt.token)
            for delivery, progress in updates
        ]
        await self._store.engine.write(
            lambda connection: connection.executemany(
                f"UPDATE record SET progress = ? WHERE id = ? AND sub = ? AND token = ? AND state = {RUNNING}", rows
            )
        )

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        by_token = {delivery.receipt.token: delivery for delivery in deliveries}
        ids = msgspec.json.encode([delivery.message.id for delivery in deliveries]).decode()
        engine = self._store.engine
        with engine.translated():
            found = engine.connection.execute(
                f"SELECT token FROM record WHERE cancel = 1 AND state = {RUNNING} "
                "AND id IN (SELECT value FROM json_each(?))",
                (ids,),
            ).fetchall()
        return [by_token[token] for (token,) in found if token in by_token]

    def _read(self, sql: str, bindings: tuple[Any, ...]) -> list[JobRecord]:
        engine, now = self._store.engine, self._store.now()
        with engine.translated():
            return [records.job_record(row, now) for row in engine.connection.execute(sql, (now, *bindings))]

    def _cancel(self, connection: sqlite3.Connection, job_id: str) -> CancelAnswer:
        now = self._store.now()
        subs = connection.execute(
            "SELECT sub FROM record WHERE id = ? AND (purge_at IS NULL OR purge_at > ?)", (job_id, now)
        ).fetchall()
        answers: list[CancelAnswer] = []
        for (sub,) in subs:
            found = claims.find(connection, job_id, sub)
            assert found is not None
            seq, record = found
            answers.append(record.cancel_now(now))
            if answers[-1] != "finished":
                claims.save(connection, seq, record)
        return records.overall(answers)
