"""Status and results: they are in the rows of the messages, and change in the transactions of their settles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.broker.postgresql import rows
from postroom.message import JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore

if TYPE_CHECKING:
    from postroom.broker.postgresql.broker import PostgreSQLBroker

_FRESH = "WHERE r.purge_at > ~.instant($1)"
_GET = f"{rows.KEPT} WHERE m.id = $2 UNION ALL {rows.REMEMBERED} {_FRESH} AND r.id = $2 ORDER BY sub"
_REPORT = """
UPDATE ~.message m SET progress = u.progress FROM unnest($1::text[], $2::bigint[], $3::text[]) AS u(id, lease, progress)
WHERE m.id = u.id AND m.lease = u.lease
"""
_CANCELLED = """
SELECT m.id, m.lease FROM ~.message m JOIN unnest($1::text[], $2::bigint[]) AS held(id, lease)
ON m.id = held.id AND m.lease = held.lease WHERE m.cancel
"""

# How each state is told apart; ``$1`` is now.
_NOW = "~.instant($1)"
_OF_KEPT = {
    JobState.SCHEDULED: f"m.state = 0 AND m.failed = 0 AND m.due > {_NOW}",
    JobState.READY: f"m.state = 0 AND m.failed = 0 AND m.due <= {_NOW}",
    JobState.RETRYING: "m.state = 0 AND m.failed > 0",
    JobState.RUNNING: "m.lane = 100 AND m.visible_at IS NOT NULL",
    JobState.DEAD: "m.state = 3",
}
_OF_REMEMBERED = {
    JobState.SUCCEEDED: "r.state = 2",
    JobState.CANCELLED: "r.state = 4",
    JobState.EXPIRED: "r.state = 5",
}


class PostgreSQLJobStore(JobStore):
    """Made by ``PostgreSQLBroker.jobs``."""

    def __init__(self, broker: PostgreSQLBroker) -> None:
        self._broker = broker

    async def get(self, job_id: str) -> list[JobRecord]:
        return await self._read(_GET, job_id)

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        parts = []
        if state is None or state in _OF_KEPT:
            parts.append(_kept(subscription, None if state is None else _OF_KEPT[state]))
        if state is None or state in _OF_REMEMBERED:
            parts.append(_remembered(subscription, None if state is None else _OF_REMEMBERED[state]))
        sql = f"SELECT * FROM ({' UNION ALL '.join(parts)}) AS found ORDER BY seq DESC LIMIT $2"
        return await self._read(sql, *((limit,) if subscription is None else (limit, subscription)))

    async def cancel(self, job_id: str) -> CancelAnswer:
        link = self._broker.link
        found = {row[0] for row in await link.fetch("SELECT ~.cancel($1, $2)", job_id, self._broker.moment())}
        if "cancelled" in found:
            # Something behind it in its line may have become the first.
            self._broker.announce()
        order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next((answer for answer in order if answer in found), "unknown")

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        told = [msgspec.json.encode(progress).decode() for _, progress in updates]
        ids, leases = _held([delivery for delivery, _ in updates])
        await self._broker.link.fetch(_REPORT, ids, leases, told)

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        found = {tuple(row) for row in await self._broker.link.fetch(_CANCELLED, *_held(deliveries))}
        return [delivery for delivery in deliveries if (delivery.message.id, delivery.receipt.lease) in found]

    async def _read(self, sql: str, *values: Any) -> list[JobRecord]:
        found = await self._broker.link.fetch(sql, self._broker.moment(), *values)
        return [rows.record(row) for row in found]


def _held(deliveries: Sequence[Any]) -> tuple[list[str], list[int]]:
    return [delivery.message.id for delivery in deliveries], [delivery.receipt.lease for delivery in deliveries]


def _kept(subscription: str | None, condition: str | None) -> str:
    conditions = ["true"]
    if subscription is not None:
        conditions.append("s.name = $3")
    if condition is not None:
        conditions.append(condition)
    return f"({rows.KEPT} WHERE {' AND '.join(conditions)} ORDER BY m.seq DESC LIMIT $2)"


def _remembered(subscription: str | None, condition: str | None) -> str:
    conditions = [_FRESH]
    if subscription is not None:
        conditions.append("s.name = $3")
    if condition is not None:
        conditions.append(condition)
    return f"({rows.REMEMBERED} {' AND '.join(conditions)} ORDER BY r.seq DESC LIMIT $2)"
