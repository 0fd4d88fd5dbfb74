"""What becomes of a record as its message is delivered and settled: pure, for every store that keeps rows.

SQL here numbers its parameters ``?1, ?2 …``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from postroom.message import Failure, JobRecord, JobState, Progress, Unique
from postroom.store.base import Again, Buried, CancelAnswer, Cancelled, Claim, Done, End

# What a record is. A waiting one is scheduled, ready, retrying or expired: times and attempts say which.
WAITING, RUNNING, SUCCEEDED, DEAD, CANCELLED, PURGED = range(6)

SELECT = """
SELECT id, sub, topic, name, state, attempt, due, created_at, started_at, finished_at, expires_at, progress, result,
    failures FROM record WHERE (purge_at IS NULL OR purge_at > ?1)
"""
"""What :func:`job_record` reads; ``?1`` is now."""

_FRESH = "(expires_at IS NULL OR expires_at > ?1)"
WHERE = {
    JobState.SCHEDULED: f"state = {WAITING} AND attempt = 1 AND due > ?1 AND {_FRESH}",
    JobState.READY: f"state = {WAITING} AND attempt = 1 AND due <= ?1 AND {_FRESH}",
    JobState.RETRYING: f"state = {WAITING} AND attempt > 1 AND {_FRESH}",
    JobState.RUNNING: f"state = {RUNNING}",
    JobState.SUCCEEDED: f"state = {SUCCEEDED}",
    JobState.DEAD: f"state = {DEAD}",
    JobState.CANCELLED: f"state IN ({CANCELLED}, {PURGED})",
    JobState.EXPIRED: f"state = {WAITING} AND expires_at <= ?1",
}
"""How each state is told apart; ``?1`` is now."""

MEMORY = 3600.0
"""Seconds a message stays known after its end, even if nothing is to be kept of it, so that a late second copy
is not run again."""
UNCONFIRMED = 86_400.0
"""Seconds after which the record of a publish that was never confirmed goes: nobody was promised anything."""

_FRESH_ROW = "(expires_at IS NULL OR expires_at > {now})"
HOLDS: dict[Unique | None, str] = {
    "until_done": f"(state = {RUNNING} OR state = {WAITING} AND {_FRESH_ROW})",
    "until_started": f"state = {WAITING} AND attempt = 1 AND {_FRESH_ROW}",
}
"""What a record is while it holds the key of a unique message; ``{now}`` is to be filled in."""
FOREVER = math.inf
"""The end of a window that lasts as long as the record of its message."""

COLUMNS = (
    "state", "attempt", "confirmed", "buried", "cancel", "copy", "token", "due", "started_at", "finished_at",
    "expires_at", "result_ttl", "purge_at", "progress", "result", "failures",
)  # fmt: skip
"""Of :class:`Record`, in its order."""

_STATES = {
    RUNNING: JobState.RUNNING,
    SUCCEEDED: JobState.SUCCEEDED,
    DEAD: JobState.DEAD,
    CANCELLED: JobState.CANCELLED,
    PURGED: JobState.CANCELLED,
}
_failures = msgspec.json.Decoder(tuple[Failure, ...])
_progress = msgspec.json.Decoder(Progress)


class Record(msgspec.Struct):
    """A row, without what never changes."""

    state: int
    attempt: int
    confirmed: bool
    """The broker is known to have it."""
    buried: bool
    """The broker is known to have it among its dead letters."""
    cancel: bool
    """Asked to stop while it runs."""
    copy: str | None
    """The publish whose copy was delivered first."""
    token: str | None
    """The holder's, also after the end."""
    due: float
    """When it may start, while it waits."""
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    result_ttl: float
    purge_at: float | None
    progress: str | None
    """JSON."""
    result: bytes | None
    failures: str
    """JSON."""

    def values(self) -> tuple[Any, ...]:
        """In the order of ``COLUMNS``."""
        return tuple(getattr(self, name) for name in COLUMNS)

    def deliver(self, claim: Claim, now: float) -> End | None:
        """See ``Store.deliver``."""
        if not claim.replayed:
            ended = self._ended(claim)
            if ended is not None:
                return ended
            if self.cancel:
                self._end(CANCELLED, now)
                return Cancelled()
        # Deaths are known only from what the broker counted; a retry has told its failure itself.
        lost = range(self.attempt, claim.attempt) if claim.suspect and self.state == RUNNING else ()
        self._remember(Failure(attempt=n, reason="worker_lost", failed_at=now) for n in lost)
        # A failure is noted before the broker is told, and the broker may not have heard of it.
        attempt = max(self.attempt, claim.attempt) if self.state == WAITING and not claim.replayed else claim.attempt
        self.state, self.attempt, self.token, self.started_at = RUNNING, attempt, claim.token, now
        self.copy = self.copy or claim.copy
        self.confirmed, self.buried, self.cancel = True, False, False
        self.result = self.progress = self.finished_at = self.purge_at = None
        return None

    def finish(self, claim: Claim, end: End, now: float) -> bool:
        """See ``Store.finish``. Doing it twice with one end is fine: whoever got no answer tries again."""
        if self.token != claim.token:
            return False
        if self.state == RUNNING:
            if isinstance(end, Buried):
                self._remember([end.failure])
                self._end(DEAD, now)
                # A dead letter is kept until somebody redrives or discards it, so its record is too.
                self.purge_at = None
            else:
                self._end(SUCCEEDED if isinstance(end, Done) else CANCELLED, now)
                self.result = end.result if isinstance(end, Done) else None
        return True

    def again(self, claim: Claim, how: Again, now: float) -> None:
        """See ``Store.again``."""
        if self.token != claim.token or self.state != RUNNING:
            return
        if how.failure is not None:
            self.attempt += 1
            self._remember([how.failure])
        self.state, self.token, self.due = WAITING, None, now + how.delay
        self.purge_at = None if self.expires_at is None else self.expires_at + self.result_ttl

    def cancel_now(self, now: float) -> CancelAnswer:
        """See ``JobStore.cancel``, for one copy."""
        if self.state == RUNNING:
            self.cancel = True
            return "requested"
        if self.state == WAITING and (self.expires_at is None or self.expires_at > now):
            self._end(CANCELLED, now)
            return "cancelled"
        return "finished"

    def _ended(self, claim: Claim) -> End | None:
        if self.copy is not None and self.copy != claim.copy:
            return Done()
        if self.state == SUCCEEDED:
            return Done()
        if self.state == CANCELLED:
            return Cancelled()
        if self.state == DEAD and not self.buried:
            return Buried(_failures.decode(self.failures)[-1])
        return None

    def _end(self, state: int, now: float) -> None:
        self.state, self.cancel, self.finished_at, self.purge_at = state, False, now, now + self.result_ttl

    def _remember(self, more: Iterable[Failure]) -> None:
        added = list(more)
        if added:
            self.failures = msgspec.json.encode([*_failures.decode(self.failures), *added]).decode()


def overall(answers: Iterable[CancelAnswer]) -> CancelAnswer:
    """Of all copies of one message."""
    given = set(answers)
    order: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
    return next((answer for answer in order if answer in given), "unknown")


def job_record(row: Any, now: float) -> JobRecord:
    """From the columns of ``SELECT``."""
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
