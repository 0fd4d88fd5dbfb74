"""Status and results, read by people and producers."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.message import Failure, JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore
from postroom.store.sqlite.schema import CANCELLED, DEAD, PURGED, RUNNING, SUCCEEDED, WAITING

if TYPE_CHECKING:
    from postroom.store.sqlite.store import SQLiteStore

_SELECT = """
SELECT id, sub, topic, name, state, attempt, due, created_at, started_at, finished_at, expires_at, progress, result,
    failures FROM record WHERE (purge_at IS NULL OR purge_at > ?1)
"""
_FRESH = "(expires_at IS NULL OR expires_at > ?1)"

# How each state is told apart in SQL; ``?1`` is now.
_WHERE = {
    JobState.SCHEDULED: f"state = {WAITING} AND attempt = 1 AND due > ?1 AND {_FRESH}",
    JobState.READY: f"state = {WAITING} AND attempt = 1 AND due <= ?1 AND {_FRESH}",
    JobState.RETRYING: f"state = {WAITING} AND attempt > 1 AND {_FRESH}",
    JobState.RUNNING: f"state = {RUNNING}",
    JobState.SUCCEEDED: f"state = {SUCCEEDED}",
    JobState.DEAD: f"state = {DEAD}",
    JobState.CANCELLED: f"state IN ({CANCELLED}, {PURGED})",
    JobState.EXPIRED: f"state = {WAITING} AND expires_at <= ?1",
}
_STATES = {
    RUNNING: JobState.RUNNING,
    SUCCEEDED: JobState.SUCCEEDED,
    DEAD: JobState.DEAD,
    CANCELLED: JobState.CANCELLED,
    PURGED: JobState.CANCELLED,
}

_failures = msgspec.json.Decoder(tuple[Failure, ...])
_progress = msgspec.json.Decoder(Progress)


class SQLiteStoreJobs(JobStore):
    """Made by ``SQLiteStore.jobs``."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store

    async def get(self, job_id: str) -> list[JobRecord]:
        return self._read(f"{_SELECT} AND id = ?2 ORDER BY sub", (job_id,))

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        conditions = [_SELECT]
        bindings: tuple[Any, ...] = (limit,)
        if subscription is not None:
            conditions.append("sub = ?3")
            bindings = (limit, subscription)
        if state is not None:
            conditions.append(_WHERE[state])
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
            return [_record(row, now) for row in engine.connection.execute(sql, (now, *bindings))]

    def _cancel(self, connection: sqlite3.Connection, job_id: str) -> CancelAnswer:
        now = self._store.now()
        found = connection.execute(
            "SELECT seq, state, expires_at FROM record WHERE id = ? AND (purge_at IS NULL OR purge_at > ?)",
            (job_id, now),
        ).fetchall()
        answers: set[CancelAnswer] = set()
        for seq, state, expires_at in found:
            if state == RUNNING:
                connection.execute("UPDATE record SET cancel = 1 WHERE seq = ?", (seq,))
                answers.add("requested")
            elif state == WAITING and (expires_at is None or expires_at > now):
                connection.execute(
                    f"UPDATE record SET state = {CANCELLED}, finished_at = ?1, purge_at = ?1 + result_ttl "
                    "WHERE seq = ?2",
                    (now, seq),
                )
                answers.add("cancelled")
            else:
                answers.add("finished")
        order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next((answer for answer in order if answer in answers), "unknown")


def _record(row: Any, now: float) -> JobRecord:
    (job_id, sub, topic, name, state, attempt, due, created_at, started_at, finished_at, expires_at, progress, result,
     failures) = row  # fmt: skip
    shown = _STATES.get(state) or _waiting(attempt, due, expires_at, now)
    waits = shown in (JobState.SCHEDULED, JobState.RETRYING)
    return JobRecord(
        id=job_id,
        subscription=sub,
        topic=topic,
        name=name,
        state=shown,
        attempt=attempt,
        created_at=created_at,
        not_before=due if waits else None,
        started_at=started_at,
        finished_at=finished_at,
        expires_at=expires_at,
        progress=_progress.decode(progress) if progress and shown is JobState.RUNNING else None,
        result=result,
        failures=_failures.decode(failures),
    )


def _waiting(attempt: int, due: float, expires_at: float | None, now: float) -> JobState:
    if expires_at is not None and expires_at <= now:
        return JobState.EXPIRED
    if attempt > 1:
        return JobState.RETRYING
    return JobState.SCHEDULED if due > now else JobState.READY
