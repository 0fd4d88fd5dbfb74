"""Status and results, read by people and producers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from postroom.message import JobRecord, JobState, Progress
from postroom.store import records
from postroom.store.base import CancelAnswer, JobStore
from postroom.store.records import RUNNING
from postroom.store.redis.rows import Place, Row

if TYPE_CHECKING:
    from postroom.store.redis.store import RedisStore


class RedisStoreJobs(JobStore):
    """Made by ``RedisStore.jobs``."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def get(self, job_id: str) -> list[JobRecord]:
        found = await self._found(job_id)
        now = self._store.now()
        return [row.shown(place, now) for place, row in sorted(found.items())]

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        now = self._store.now()
        found: list[JobRecord] = []
        async for places in self._store.newest(subscription):
            rows = await self._store.rows.read(places)
            shown = [rows[place].shown(place, now) for place in places if place in rows and _lasts(rows[place], now)]
            found += [record for record in shown if state is None or record.state is state]
            if len(found) >= limit:
                break
        return found[:limit]

    async def cancel(self, job_id: str) -> CancelAnswer:
        now = self._store.now()
        answers: dict[Place, CancelAnswer] = {}

        def decide(place: Place, row: Row | None) -> Row | None:
            if row is not None:
                answers[place] = row.record.cancel_now(now)
            return row

        await self._store.rows.change(await self._found(job_id), decide)
        return records.overall(answers.values())

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        # A zombie and its successor may tell of the same record.
        told = {
            (Place(delivery.message.id, delivery.subscription), delivery.receipt.token): progress
            for delivery, progress in updates
        }

        def decide(place: Place, row: Row | None) -> Row | None:
            progress = None if row is None else told.get((place, row.record.token))
            if row is None or progress is None or row.record.state != RUNNING:
                return None
            row.record.progress = msgspec.json.encode(progress).decode()
            return row

        await self._store.rows.change((place for place, _ in told), decide)

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        places = [Place(delivery.message.id, delivery.subscription) for delivery in deliveries]
        rows = await self._store.rows.read(places)
        return [
            delivery
            for place, delivery in zip(places, deliveries, strict=True)
            if place in rows
            and rows[place].record.cancel
            and rows[place].record.state == RUNNING
            and rows[place].record.token == delivery.receipt.token
        ]

    async def _found(self, job_id: str) -> dict[Place, Row]:
        now = self._store.now()
        places = [Place(job_id, sub) for sub in await self._store.subscriptions_of(job_id)]
        rows = await self._store.rows.read(places)
        return {place: row for place, row in rows.items() if _lasts(row, now)}


def _lasts(row: Row, now: float) -> bool:
    return row.record.purge_at is None or row.record.purge_at > now
