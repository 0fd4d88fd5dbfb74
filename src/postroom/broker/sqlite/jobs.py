"""Status and results: they live in the rows of the messages, and change in the transactions of their settles."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.broker.sqlite import rows, schema, settle
from postroom.message import JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore

if TYPE_CHECKING:
    from postroom.broker.sqlite.broker import SQLiteBroker

_SELECT = f"SELECT {rows.RECORD} FROM message AS m"
_JOIN = "LEFT JOIN subscription AS s ON s.id = m.sub WHERE (m.purge_at IS NULL OR m.purge_at > ?1)"
_ANY_SUBSCRIPTION = "m.sub IN (SELECT id FROM subscription)"

# How each state is told apart in SQL; ``?1`` is now.
_WHERE = {
    JobState.SCHEDULED: "m.state = 0 AND m.failures = 0 AND m.due > ?1",
    JobState.READY: "m.state = 0 AND m.failures = 0 AND m.due <= ?1",
    JobState.RETRYING: "m.state = 0 AND m.failures > 0",
    JobState.RUNNING: f"m.state = 1 AND m.lane > 0 AND m.visible_at IS NOT NULL AND {_ANY_SUBSCRIPTION}",
    JobState.SUCCEEDED: "m.state = 2",
    JobState.DEAD: f"m.state = 3 AND {_ANY_SUBSCRIPTION}",
    JobState.CANCELLED: "m.state = 4",
    JobState.EXPIRED: "m.state = 5",
}
# Those a person looks at most: found without a look at the rest.
_INDEX = {JobState.RUNNING: "INDEXED BY message_ready", JobState.DEAD: "INDEXED BY message_dead"}


class SQLiteJobStore(JobStore):
    """Made by ``SQLiteBroker.jobs``."""

    def __init__(self, broker: SQLiteBroker) -> None:
        self._broker = broker

    async def get(self, job_id: str) -> list[JobRecord]:
        engine = self._broker.engine
        with engine.translated():
            found = engine.connection.execute(
                f"{_SELECT} {_JOIN} AND m.id = ?2 ORDER BY m.sub", (self._broker.now(), job_id)
            ).fetchall()
            return self._records(found)

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        index = "" if state is None else _INDEX.get(state, "")
        conditions = [f"{_SELECT} {index} {_JOIN}"]
        if subscription is not None:
            conditions.append("s.name = ?3")
        if state is not None:
            conditions.append(_WHERE[state])
        sql = f"{' AND '.join(conditions)} ORDER BY m.seq DESC LIMIT ?2"
        engine = self._broker.engine
        bindings = (self._broker.now(), limit, subscription)[: 2 if subscription is None else 3]
        with engine.translated():
            return self._records(engine.connection.execute(sql, bindings).fetchall())

    async def cancel(self, job_id: str) -> CancelAnswer:
        return await self._broker.engine.write(
            lambda connection: self._cancel(connection, job_id), done=lambda _: self._broker.announce()
        )

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        def run(connection: sqlite3.Connection) -> None:
            for delivery, progress in updates:
                text = msgspec.json.encode(progress).decode()
                connection.execute(
                    "UPDATE message SET progress = ? WHERE seq = ? AND lease = ?", (text, *delivery.receipt.seq_lease)
                )

        await self._broker.engine.write(run)

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        by_seq = {delivery.receipt.seq_lease: delivery for delivery in deliveries}
        seqs = msgspec.json.encode([seq for seq, _ in by_seq]).decode()
        engine = self._broker.engine
        with engine.translated():
            found = engine.connection.execute(
                "SELECT seq, lease FROM message WHERE cancel = 1 AND seq IN (SELECT value FROM json_each(?))", (seqs,)
            ).fetchall()
        return [by_seq[claim] for claim in found if claim in by_seq]

    def _records(self, found: list[Any]) -> list[JobRecord]:
        now = self._broker.now()
        return [rows.record(self._broker.engine.connection, row, now) for row in found]

    def _cancel(self, connection: sqlite3.Connection, job_id: str) -> CancelAnswer:
        found = connection.execute("SELECT seq, state FROM message WHERE id = ?", (job_id,)).fetchall()
        answers: set[CancelAnswer] = set()
        for seq, state in found:
            if state == schema.WAITING:
                settle.end(connection, self._broker.now(), schema.CANCELLED, seq)
                answers.add("cancelled")
            elif state == schema.LEASED:
                connection.execute("UPDATE message SET cancel = 1 WHERE seq = ?", (seq,))
                answers.add("requested")
            else:
                answers.add("finished")
        order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next((answer for answer in order if answer in answers), "unknown")
