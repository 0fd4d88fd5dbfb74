"""Status and results: the copies themselves are the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from postroom.message import JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer, JobStore

if TYPE_CHECKING:
    from postroom.broker.memory.broker import MemoryBroker


class MemoryJobStore(JobStore):
    """Made by ``MemoryBroker.jobs``."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def get(self, job_id: str) -> list[JobRecord]:
        now = self._broker.clock.now()
        state = self._broker.state
        with state.mutex:
            state.forget_old(now)
            for queue in state.queues.values():
                queue.expire(now)
            found = [
                queue.record(queue.copies[job_id], now) for queue in state.queues.values() if job_id in queue.copies
            ]
            return found or ([state.unwanted[job_id][1]] if job_id in state.unwanted else [])

    async def search(
        self, *, subscription: str | None = None, state: JobState | None = None, limit: int = 100
    ) -> list[JobRecord]:
        now = self._broker.clock.now()
        with self._broker.state.mutex:
            found = [
                (copy.seq, queue.record(copy, now))
                for queue in self._broker.state.queues.values()
                if subscription in (None, queue.spec.name)
                for copy in queue.copies.values()
            ]
        found.sort(key=lambda item: item[0], reverse=True)
        return [record for _, record in found if state in (None, record.state)][:limit]

    async def cancel(self, job_id: str) -> CancelAnswer:
        answers: set[CancelAnswer] = set()
        with self._broker.state.mutex:
            for queue in self._broker.state.queues.values():
                copy = queue.copies.get(job_id)
                if copy is None:
                    continue
                if copy.ended is not None:
                    answers.add("finished")
                elif copy.holder is not None:
                    copy.cancel = True
                    answers.add("requested")
                else:
                    queue.end(copy, JobState.CANCELLED, self._broker.clock.now())
                    answers.add("cancelled")
            if not answers and job_id in self._broker.state.unwanted:
                answers.add("finished")
        order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next((answer for answer in order if answer in answers), "unknown")

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        with self._broker.state.mutex:
            for delivery, progress in updates:
                if delivery.receipt.holds:
                    delivery.receipt.copy.progress = progress

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        with self._broker.state.mutex:
            return [delivery for delivery in deliveries if delivery.receipt.copy.cancel]
