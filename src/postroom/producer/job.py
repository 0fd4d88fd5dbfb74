"""A job seen from its producer: ask for its state, wait for its result, cancel it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import msgspec

from postroom.broker.base import Broker
from postroom.broker.thread import BrokerThread
from postroom.errors import JobCancelled, JobFailed, JobNotFound
from postroom.message import Failure, JobRecord, JobState, Progress
from postroom.store.base import CancelAnswer

T = TypeVar("T")

_FIRST_POLL = 0.005
_LAST_POLL = 0.25

# The state of an event is that of the subscription which is furthest from a good end.
_WORST_FIRST = (
    JobState.RUNNING,
    JobState.RETRYING,
    JobState.READY,
    JobState.SCHEDULED,
    JobState.DEAD,
    JobState.CANCELLED,
    JobState.EXPIRED,
    JobState.SUCCEEDED,
)


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment. Times are unix seconds."""

    id: str
    state: JobState
    name: str
    """The task, or for an event its topic."""
    topic: str
    attempt: int
    """The attempt that runs, or ran last, or comes next; from 1."""
    created_at: float
    not_before: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    progress: Progress | None = None
    result: Any = None
    error: Failure | None = None
    """The last failure; also while it is being retried."""
    failures: tuple[Failure, ...] = ()
    subscriptions: dict[str, JobState] = {}
    """The state in each subscription; for a job, its queue alone."""


def combine(records: Sequence[JobRecord]) -> JobStatus:
    """One status out of the records of all subscriptions (at least one)."""
    record = min(records, key=lambda item: _WORST_FIRST.index(item.state))
    failures = tuple(failure for item in records for failure in item.failures)
    return JobStatus(
        id=record.id,
        state=record.state,
        name=record.name,
        topic=record.topic,
        attempt=record.attempt,
        created_at=record.created_at,
        not_before=record.not_before,
        started_at=record.started_at,
        finished_at=record.finished_at if record.state.final else None,
        progress=record.progress,
        result=None if record.result is None else msgspec.json.decode(record.result),
        error=record.failures[-1] if record.failures and record.state is not JobState.SUCCEEDED else None,
        failures=failures,
        subscriptions={item.subscription: item.state for item in records if item.subscription},
    )


class Job(Generic[T]):
    """A handle on an enqueued call, or on a published event, by its id. Making one does no I/O."""

    __slots__ = ("_thread", "id")

    def __init__(self, job_id: str, thread: BrokerThread) -> None:
        self.id = job_id
        self._thread = thread

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobStatus:
        """Its state now. Raises ``JobNotFound``: never existed, or ended longer ago than its ``result_ttl``."""
        return self._thread.call(self._status)

    async def astatus(self) -> JobStatus:
        """See :meth:`status`."""
        return await self._thread.acall(self._status)

    def result(self, timeout: float | None = None) -> T:
        """Wait up to ``timeout`` seconds (``None``: without end) for the end, and return what the handler returned.

        Raises ``JobFailed`` (it is dead), ``JobCancelled`` (or expired), ``TimeoutError``, ``JobNotFound``.
        """
        return self._thread.call(lambda broker: self._result(broker, timeout))

    async def aresult(self, timeout: float | None = None) -> T:
        """See :meth:`result`."""
        return await self._thread.acall(lambda broker: self._result(broker, timeout))

    def outcome(self, timeout: float | None = None) -> JobStatus:
        """Wait up to ``timeout`` seconds for the end; the status then, ended or not."""
        return self._thread.call(lambda broker: self._wait(broker, timeout))

    async def aoutcome(self, timeout: float | None = None) -> JobStatus:
        """See :meth:`outcome`."""
        return await self._thread.acall(lambda broker: self._wait(broker, timeout))

    def cancel(self) -> CancelAnswer:
        """Cancel it: ``"cancelled"`` (will never start), ``"requested"`` (it runs, its worker is told), ``"finished"``.

        Raises ``JobNotFound``.
        """
        return self._thread.call(self._cancel)

    async def acancel(self) -> CancelAnswer:
        """See :meth:`cancel`."""
        return await self._thread.acall(self._cancel)

    async def _status(self, broker: Broker) -> JobStatus:
        records = await broker.jobs.get(self.id)
        if not records:
            raise JobNotFound(f"no job {self.id}: it never existed, or it ended longer ago than its results are kept")
        return combine(records)

    async def _wait(self, broker: Broker, timeout: float | None) -> JobStatus:
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        pause = _FIRST_POLL
        while True:
            status = await self._status(broker)
            if status.state.final:
                return status
            if deadline is not None:
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    return status
                pause = min(pause, left)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LAST_POLL)

    async def _result(self, broker: Broker, timeout: float | None) -> T:
        status = await self._wait(broker, timeout)
        if status.state is JobState.SUCCEEDED:
            return cast(T, status.result)
        if status.state is JobState.DEAD:
            error = status.error
            detail = f": {error.error or error.reason}: {error.message}" if error else ""
            raise JobFailed(f"job {self.id} failed for good{detail}", error)
        if status.state.final:
            raise JobCancelled(f"job {self.id} was {status.state}")
        raise TimeoutError(f"job {self.id} is still {status.state} after {timeout} s")

    async def _cancel(self, broker: Broker) -> CancelAnswer:
        answer = await broker.jobs.cancel(self.id)
        if answer == "unknown":
            raise JobNotFound(f"no job {self.id} to cancel")
        return answer
