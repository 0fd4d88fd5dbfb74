"""Status and results, read by people and producers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.message import JobRecord, JobState, Progress
from postroom.store import records
from postroom.store.base import CancelAnswer, JobStore
from postroom.store.postgresql import claims
from postroom.store.postgresql.session import Session
from postroom.store.records import RUNNING, SELECT, WHERE

if TYPE_CHECKING:
    from postroom.store.postgresql.store import PostgreSQLStore


class PostgreSQLStoreJobs(JobStore):
    """Made by ``PostgreSQLStore.jobs``."""

    def __init__(self, store: PostgreSQLStore) -> None:
        self._store = store

    async def get(self, job_id: str) -> list[JobRecord]:
        return await self._read(f"{SELECT} AND id = ?2 ORDER BY sub", job_id)

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        conditions = [SELECT]
        bindings: list[Any] = [limit]
        if subscription is not None:
            conditions.append("sub = ?3")
            bindings.append(subscription)
        if state is not None:
            conditions.append(WHERE[state])
        return await self._read(f"{' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?2", *bindings)

    async def cancel(self, job_id: str) -> CancelAnswer:
        return await self._store.transact(lambda session: self._cancel(session, job_id))

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        rows = [
            (msgspec.json.encode(progress).decode(), delivery.message.id, delivery.subscription, delivery.receipt.token)
            for delivery, progress in updates
        ]
        sql = f"UPDATE ~.record SET progress = $1 WHERE id = $2 AND sub = $3 AND token = $4 AND state = {RUNNING}"
        ordered = sorted(rows, key=lambda row: row[1:])
        await self._store.transact(lambda session: session.executemany(sql, ordered))

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        by_token = {delivery.receipt.token: delivery for delivery in deliveries}
        ids = [delivery.message.id for delivery in deliveries]
        sql = f"SELECT token FROM ~.record WHERE cancel AND state = {RUNNING} AND id = ANY($1::text[])"
        found = await self._store.transact(lambda session: session.fetch(sql, ids))
        return [by_token[row[0]] for row in found if row[0] in by_token]

    async def _read(self, sql: str, *bindings: Any) -> list[JobRecord]:
        now = self._store.now()
        # What all stores share is written for one without schemas.
        ours = sql.replace("?", "$").replace("FROM record", "FROM ~.record")
        found = await self._store.transact(lambda session: session.fetch(ours, now, *bindings))
        return [records.job_record(row, now) for row in found]

    async def _cancel(self, session: Session, job_id: str) -> CancelAnswer:
        now = self._store.now()
        subs = await session.fetch(
            "SELECT sub FROM ~.record WHERE id = $1 AND (purge_at IS NULL OR purge_at > $2)", job_id, now
        )
        rows = await claims.find(session, [(job_id, row[0]) for row in subs])
        answers = [record.cancel_now(now) for _, record in rows.values()]
        await claims.save(session, rows)
        return records.overall(answers)
