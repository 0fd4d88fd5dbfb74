"""What must be remembered beside the messages: status, results, progress, cancellation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from postroom.message import JobRecord, JobState, Progress

CancelAnswer = Literal["cancelled", "requested", "finished", "unknown"]
"""``cancelled``: it will never start. ``requested``: it runs, its worker is told.
``finished``: too late. ``unknown``: no such job."""


class JobStore(ABC):
    """Status of jobs by id. A state never goes backwards once final, except by a redrive."""

    @abstractmethod
    async def get(self, job_id: str) -> list[JobRecord]:
        """The job's record; for an event one record for each subscription that got a copy.

        ``[]`` if the id is unknown. An event that no subscription wanted has one record with an empty
        ``subscription``, succeeded, for as long as it is retained.
        """

    @abstractmethod
    async def search(
        self,
        *,
        subscription: str | None = None,
        state: JobState | None = None,
        limit: int = 100,
    ) -> list[JobRecord]:
        """The newest records first."""

    @abstractmethod
    async def cancel(self, job_id: str) -> CancelAnswer:
        """Cancel every copy that has not ended."""

    @abstractmethod
    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        """Record the progress of running deliveries, given as ``(delivery, progress)``.

        Ignored for a delivery whose lease is lost (a zombie must not write a status)."""

    @abstractmethod
    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        """Those of the running ``deliveries`` whose cancellation was requested."""
