"""Status of jobs: a view of the copies the memory broker keeps anyway."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from postroom.broker.memory.state import State
from postroom.message import JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore


class MemoryJobs(JobStore):
    """See :class:`postroom.store.base.JobStore`."""

    def __init__(self, opened: Callable[[], AbstractContextManager[State]]) -> None:
        """``opened()`` is the state, locked and up to date; it raises ``BrokerClosed``."""
        self._opened = opened

    async def get(self, job_id: str) -> list[JobRecord]:
        with self._opened() as state:
            return [copy.record(state.now) for copy in state.copies_of(job_id)]

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        with self._opened() as kept:
            if subscription is None:
                copies = [copy for message_id in kept.by_id for copy in kept.copies_of(message_id)]
            else:
                copies = list(kept.subscription(subscription).copies.values())
            found = [copy for copy in copies if state is None or copy.state(kept.now) is state]
            newest = heapq.nlargest(limit, found, key=lambda copy: copy.number)
            return [copy.record(kept.now) for copy in newest]

    async def cancel(self, job_id: str) -> CancelAnswer:
        with self._opened() as state:
            return state.cancel(state.copies_of(job_id))

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        with self._opened():
            for delivery, progress in updates:
                if delivery.receipt.alive:
                    delivery.receipt.copy.progress = progress

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        with self._opened():
            return [
                delivery for delivery in deliveries if delivery.receipt.alive and delivery.receipt.copy.cancel_requested
            ]
