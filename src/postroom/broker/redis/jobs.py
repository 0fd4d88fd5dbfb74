"""Status and results: they live in the hashes of the messages, and change in the scripts that settle them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from postroom.broker.redis import records
from postroom.broker.redis.link import Link
from postroom.broker.redis.topology import Known, Topology
from postroom.message import JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore


class RedisJobs(JobStore):
    """Made by ``RedisBroker.jobs``."""

    def __init__(self, link: Link, topology: Topology) -> None:
        self._link = link
        self._topology = topology

    async def get(self, job_id: str) -> list[JobRecord]:
        return await self._topology.using(lambda known: self._get(known, job_id))

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        if subscription is not None:
            names = [(await self._topology.subscription(subscription)).name]
        else:
            names = ["", *(await self._topology.read()).subscriptions]
        found = [entry for name in names for entry in await self._search(name, state, limit)]
        found.sort(key=lambda entry: entry[0], reverse=True)
        return [record for _, record in found[:limit]]

    async def cancel(self, job_id: str) -> CancelAnswer:
        told = await self._topology.using(lambda known: self._cancel(known, job_id))
        order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next((answer for answer in order if answer.encode() in told), "unknown")

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        await self._report([(delivery, msgspec.json.encode(progress)) for delivery, progress in updates])

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        return await self._report([(delivery, b"") for delivery in deliveries])

    async def _get(self, known: Known, job_id: str) -> list[JobRecord]:
        names = [*known.subscriptions, ""]
        escaped = map(records.escape, names)
        told = await self._link.run("records", job_id, len(names), *escaped, version=known.version)
        found = [
            records.record(job_id, names[told[at] - 1], records.mapping(told[at + 1]), float(told[0]))
            for at in range(1, len(told), 2)
        ]
        # That nobody wanted it counts only while that is so.
        return [record for record in found if record.subscription] or found

    async def _cancel(self, known: Known, job_id: str) -> list[bytes]:
        names = [*map(records.escape, known.subscriptions), ""]
        told: list[bytes] = await self._link.run("cancel", job_id, len(names), *names, version=known.version)
        return told

    async def _search(self, name: str, state: JobState | None, limit: int) -> list[tuple[bytes, JobRecord]]:
        found: list[tuple[bytes, JobRecord]] = []
        before = b""
        while len(found) < limit:
            # Step by step: the server does nothing else meanwhile.
            told = await self._link.run("search", records.escape(name), before, state or "", limit - len(found))
            for at in range(2, len(told), 2):
                stored = records.mapping(told[at + 1])
                record = records.record(told[at].decode(), name, stored, float(told[0]))
                found.append((stored.get(b"seq", b""), record))
            before = told[1]
            if not before:
                break
        return found

    async def _report(self, updates: Sequence[tuple[Any, bytes]]) -> list[Any]:
        """Those whose cancellation was requested."""
        cancelled: list[Any] = []
        by_subscription: dict[str, list[tuple[Any, bytes]]] = {}
        for delivery, progress in updates:
            by_subscription.setdefault(delivery.subscription, []).append((delivery, progress))
        for name, batch in by_subscription.items():
            rows: list[Any] = []
            for delivery, progress in batch:
                rows += (delivery.message.id, delivery.receipt.lease, progress)
            told = await self._link.run("report", records.escape(name), len(batch), *rows)
            cancelled += [delivery for (delivery, _), asked in zip(batch, told, strict=True) if asked]
        return cancelled
