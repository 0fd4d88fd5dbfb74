"""What the broker remembers: subscriptions and their copies of messages. Nothing here waits or knows a loop."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry, Subscription, SubscriptionStats
from postroom.message import DeadLetter, Failure, JobRecord, JobState, Message, Progress

FRONT = 0.0
"""The ``visible_at`` of what was given back: ahead of all that is ready."""


@dataclass(eq=False)
class Copy:
    """One subscription's copy of a message, and later its record."""

    message: Message
    seq: int
    due: float
    visible_at: float | None = None
    """When it may be claimed; while leased, when the lease ends. ``None``: ended, or behind its key."""
    holder: object | None = None
    """The lease: a new object for every claim."""
    noted_start: bool = False
    ended: JobState | None = None
    failed: int = 0
    """Failures that count against the attempts."""
    failures: tuple[Failure, ...] = ()
    suspect: bool = False
    cancel: bool = False
    redriven: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    progress: Progress | None = None
    result: bytes | None = None

    def state(self, now: float) -> JobState:
        if self.ended is not None:
            return self.ended
        if self.holder is not None:
            return JobState.RUNNING
        if self.failed:
            return JobState.RETRYING
        return JobState.SCHEDULED if self.due > now else JobState.READY


@dataclass(eq=False)
class Queue:
    """One subscription with all its copies."""

    spec: Subscription
    copies: dict[str, Copy] = field(default_factory=dict)
    live: int = 0
    """Copies that have not ended."""
    _lanes: dict[int, list[tuple[float, int, Copy]]] = field(default_factory=dict)
    _purge: list[tuple[float, int, Copy]] = field(default_factory=list)
    _lines: dict[str, list[Copy]] = field(default_factory=dict)
    """Unsettled copies by key, in publish order, if the subscription is ordered."""

    # Adding and showing

    def add(self, message: Message, seq: int, due: float) -> bool:
        """False if the message is held or remembered already."""
        if message.id in self.copies:
            return False
        copy = self.copies[message.id] = Copy(message, seq, due)
        self._enter(copy)
        return True

    def full(self) -> bool:
        return self.spec.limit is not None and self.live >= self.spec.limit

    def wants(self, headers: Mapping[str, str]) -> bool:
        return all(headers.get(name) == value for name, value in self.spec.where.items())

    def record(self, copy: Copy, now: float) -> JobRecord:
        state = copy.state(now)
        waits = state in (JobState.SCHEDULED, JobState.RETRYING)
        return JobRecord(
            id=copy.message.id,
            subscription=self.spec.name,
            topic=copy.message.topic,
            name=copy.message.name,
            state=state,
            attempt=max(1, copy.failed) if state is JobState.DEAD else copy.failed + 1,
            created_at=copy.message.created_at,
            not_before=(copy.due if copy.failed or copy.message.not_before is None else copy.message.not_before)
            if waits
            else None,
            started_at=copy.started_at,
            finished_at=copy.finished_at,
            expires_at=copy.message.expires_at,
            progress=copy.progress if state is JobState.RUNNING else None,
            result=copy.result,
            failures=copy.failures,
        )

    def stats(self, now: float, queue: bool) -> SubscriptionStats:
        live = [copy for copy in self.copies.values() if copy.ended is None]
        running = sum(copy.holder is not None for copy in live)
        ready = [
            copy for copy in live if copy.holder is None and copy.visible_at is not None and copy.visible_at <= now
        ]
        return SubscriptionStats(
            name=self.spec.name,
            pattern=self.spec.pattern,
            queue=queue,
            ready=len(ready),
            delayed=len(live) - len(ready) - running,
            running=running,
            dead=sum(copy.ended is JobState.DEAD for copy in self.copies.values()),
            oldest=max((now - copy.due for copy in ready), default=None),
        )

    # Claiming

    def claim(self, now: float, until: float, limit: int, *, suspect: bool) -> list[Copy]:
        """Lease up to ``limit`` copies until then; at most one suspect, and none unless ``suspect``."""
        claimed: list[Copy] = []
        for lane in sorted(self._lanes):
            aside = []
            heap = self._lanes[lane]
            while heap and heap[0][0] <= now and len(claimed) < limit:
                entry = heapq.heappop(heap)
                copy = entry[2]
                if copy.visible_at != entry[0] or not self._is_claimable(copy, now):
                    continue
                if copy.suspect and not suspect:
                    aside.append(entry)
                    continue
                suspect = suspect and not copy.suspect
                copy.holder, copy.noted_start, copy.started_at = object(), False, now
                claimed.append(copy)
                self._show(copy, until)
            for entry in aside:
                heapq.heappush(heap, entry)
        return claimed

    def next_due(self, now: float) -> float | None:
        """When the next copy becomes visible by time alone."""
        return min((at for heap in self._lanes.values() for at, _, _ in heap if at > now), default=None)

    def _is_claimable(self, copy: Copy, now: float) -> bool:
        """Whether to deliver it; what is not is dealt with."""
        if copy.holder is not None:
            self.give_back(copy, now)
            return False
        if copy.message.expires_at is not None and copy.message.expires_at <= now:
            self.end(copy, JobState.EXPIRED, now)
            return False
        return True

    def give_back(self, copy: Copy, now: float) -> None:
        """Its lease has ended: counted, and a suspect, only if its handler had been started."""
        if copy.noted_start:
            failure = Failure(
                attempt=copy.failed + 1,
                reason="worker_lost",
                message="its worker died, or froze past its lease, while it ran",
                started_at=copy.started_at,
                failed_at=now,
            )
            copy.failed, copy.failures, copy.suspect = copy.failed + 1, (*copy.failures, failure), True
        self._wait(copy, FRONT, now)

    # Settling

    def settle(self, copy: Copy, outcome: Outcome, now: float) -> None:
        """Perform an outcome for whoever holds the copy."""
        if isinstance(outcome, Retry | Release) and copy.cancel:
            outcome = Cancel()
        if isinstance(outcome, Ack):
            copy.result = outcome.result
            self.end(copy, JobState.SUCCEEDED, now)
        elif isinstance(outcome, Cancel):
            self.end(copy, JobState.CANCELLED, now)
        elif isinstance(outcome, Dead):
            self._fail(copy, outcome.failure)
            self.end(copy, JobState.DEAD, now)
        elif isinstance(outcome, Retry):
            self._fail(copy, outcome.failure)
            copy.suspect = outcome.suspect
            self._wait(copy, now + outcome.delay, now + outcome.delay)
        elif outcome.delay > 0:
            self._wait(copy, now + outcome.delay, now + outcome.delay)
        else:
            self._wait(copy, FRONT, now)

    def end(self, copy: Copy, state: JobState, now: float) -> None:
        """The message comes to its end; the copy stays as its record."""
        copy.ended, copy.finished_at, copy.visible_at, copy.holder, copy.suspect = state, now, None, None, False
        copy.progress = None
        self.live -= 1
        if state is not JobState.DEAD:
            heapq.heappush(self._purge, (now + copy.message.result_ttl, copy.seq, copy))
        line = self._line(copy)
        if line is not None:
            line.remove(copy)
            self._advance(line)

    def extend(self, copy: Copy, until: float) -> None:
        self._show(copy, until)

    # A person's doings

    def dead(self) -> list[Copy]:
        """Dead copies, oldest first."""
        found = [copy for copy in self.copies.values() if copy.ended is JobState.DEAD]
        return sorted(found, key=lambda copy: (copy.finished_at or 0.0, copy.seq))

    def letter(self, copy: Copy) -> DeadLetter:
        return DeadLetter(
            message=copy.message,
            subscription=self.spec.name,
            failures=copy.failures,
            dead_at=copy.finished_at or 0.0,
            redriven=copy.redriven,
        )

    def revive(self, copy: Copy, now: float) -> None:
        """Run a message that had ended once more, with its attempts counted from 1."""
        copy.ended, copy.failed, copy.suspect, copy.cancel, copy.result = None, 0, False, False, None
        copy.finished_at, copy.due = None, now
        self._enter(copy)

    def forget_old(self, now: float) -> None:
        """Remove the records whose time is over."""
        while self._purge and self._purge[0][0] <= now:
            copy = heapq.heappop(self._purge)[2]
            if copy.ended not in (None, JobState.DEAD) and (copy.finished_at or 0) + copy.message.result_ttl <= now:
                self.copies.pop(copy.message.id, None)

    def expire(self, now: float) -> None:
        """End what waits past its expiry."""
        for copy in list(self.copies.values()):
            expires_at = copy.message.expires_at
            if expires_at is not None and expires_at <= now and copy.ended is None and copy.holder is None:
                self.end(copy, JobState.EXPIRED, now)

    # Keeping order

    def _fail(self, copy: Copy, failure: Failure) -> None:
        copy.failed += 1
        copy.failures = (*copy.failures, failure)

    def _enter(self, copy: Copy) -> None:
        self.live += 1
        line = self._line(copy)
        if line is None:
            self._show(copy, copy.due)
        else:
            line.append(copy)
            line.sort(key=lambda other: other.seq)
            self._advance(line)

    def _wait(self, copy: Copy, visible_at: float, due: float) -> None:
        copy.holder, copy.noted_start, copy.progress, copy.due = None, False, None, due
        self._show(copy, visible_at)

    def _show(self, copy: Copy, visible_at: float) -> None:
        copy.visible_at = visible_at
        heapq.heappush(self._lanes.setdefault(-copy.message.priority, []), (visible_at, next(_ticket), copy))

    def _line(self, copy: Copy) -> list[Copy] | None:
        if not self.spec.ordered or copy.message.key is None:
            return None
        return self._lines.setdefault(copy.message.key, [])

    def _advance(self, line: list[Copy]) -> None:
        """Let the first of a key be claimed, and only the first, unless one of the key is running."""
        if any(copy.holder is not None for copy in line):
            return
        for position, copy in enumerate(line):
            if position > 0:
                copy.visible_at = None
            elif copy.visible_at is None:
                self._show(copy, copy.due)


_ticket = itertools.count()


def matches(pattern: str, topic: str) -> bool:
    """Whether the topic fits: ``*`` stands for one word, ``#`` for any number of words, none included."""
    return _matches(pattern.split("."), topic.split("."))


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])
