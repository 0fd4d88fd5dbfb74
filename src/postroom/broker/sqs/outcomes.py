"""What an outcome does to a message: in each case the copy is confirmed before the original goes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from itertools import chain

from postroom.broker.base import Dead, Outcome, Release, Retry
from postroom.broker.sqs.held import MOST_HIDDEN, Held, Memory
from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.service import Answers, Service
from postroom.broker.sqs.wire import Copy, entry
from postroom.clock import Clock
from postroom.errors import BrokerUnavailable, LeaseLost

logger = logging.getLogger("postroom.broker.sqs")


class Outcomes:
    """Performs them on the messages of one subscription, in full batches. Whoever calls has checked the leases."""

    def __init__(self, service: Service, kept: Kept, *, clock: Clock, memory: Memory) -> None:
        self._service = service
        self._kept = kept
        self._clock = clock
        self._memory = memory

    async def perform(self, settlements: Sequence[tuple[Held, Outcome]]) -> Answers:
        """In order: what ends, what comes again, what is dead."""
        ends: list[Held] = []
        again: list[tuple[Held, Copy]] = []
        dead: list[tuple[Held, Copy]] = []
        hidden: list[tuple[Held, Retry | Release]] = []
        now = self._clock.now()
        for held, outcome in settlements:
            if isinstance(outcome, Dead):
                failures = (*held.copy.envelope.failures, outcome.failure)
                dead.append((held, held.copy.changed(failures=failures, dead_at=now, due=None, suspect=False)))
            elif not isinstance(outcome, Retry | Release):
                ends.append(held)
            elif self._kept.declared.ordered:
                hidden.append((held, outcome))
            else:
                again.append((held, self._again(held, outcome, now)))
        results = await asyncio.gather(
            self.delete(ends), self.move(again), self.move(dead, self._kept.dead_url), self._hide(hidden)
        )
        helds = [*ends, *(held for held, _ in (*again, *dead)), *(held for held, _ in hidden)]
        answers = dict(zip(helds, chain(*results), strict=True))
        return [answers[held] for held, _ in settlements]

    def _again(self, held: Held, outcome: Retry | Release, now: float) -> Copy:
        """The copy that comes next: it begins with no receives, so that all of those to come are accounted for."""
        due = now + outcome.delay if outcome.delay > 0 else None
        if isinstance(outcome, Release):
            return held.copy.changed(due=due, suspect=held.suspect)
        return held.copy.changed(
            due=due,
            suspect=outcome.suspect,
            counted=held.copy.envelope.counted + 1,
            failures=(*held.copy.envelope.failures, outcome.failure),
        )

    async def _hide(self, settlements: Sequence[tuple[Held, Retry | Release]]) -> Answers:
        """In an ordered queue it comes again in its place, and its key waits behind it."""
        for held, outcome in settlements:
            if outcome.delay > MOST_HIDDEN:
                logger.warning(
                    "%s: %s waits 12 h, not %.0f s: an ordered SQS queue hides no message for longer",
                    self._kept.name, held.copy.envelope.id, outcome.delay,
                )  # fmt: skip
        hidden = [(held.receipt, min(held.longest(), math.ceil(outcome.delay))) for held, outcome in settlements]
        answers = await self._service.hide(self._kept.url, hidden)
        for (held, outcome), answer in zip(settlements, answers, strict=True):
            if answer is None:
                self._memory.note(held, outcome.failure if isinstance(outcome, Retry) else None)
        return answers

    async def delete(self, helds: Sequence[Held]) -> Answers:
        answers = await self._service.delete(self._kept.url, [held.receipt for held in helds])
        for number, (held, answer) in enumerate(zip(helds, answers, strict=True)):
            if answer is None:
                self._memory.forget(held.identity)
            elif isinstance(answer, BrokerUnavailable):
                # Perhaps it was done, and only the answer is lost: then it will be unknown next time.
                held.uncertain = True
            elif isinstance(answer, LeaseLost) and held.uncertain:
                answers[number] = None
        return answers

    async def move(self, moves: Sequence[tuple[Held, Copy]], url: str | None = None) -> Answers:
        """Store the copies, in this queue or as dead letters at ``url``; only then delete the originals whose copy
        is confirmed."""
        if not moves:
            return []
        now = self._clock.now()
        fresh = [(held, copy) for held, copy in moves if not held.copied]
        entries = [
            entry(
                copy,
                fifo=self._kept.declared.ordered,
                delay=(copy.envelope.due or now) - now,
                origin=held.identity,
                alone=url is not None,
            )
            for held, copy in fresh
        ]
        sent = await self._service.send(url or self._kept.url, entries)
        refused = {held: answer for (held, _), answer in zip(fresh, sent, strict=True) if answer is not None}
        for held, _ in moves:
            held.copied = held not in refused
        stored = [held for held, _ in moves if held.copied]
        deleted = dict(zip(stored, await self.delete(stored), strict=True))
        return [refused[held] if held in refused else deleted[held] for held, _ in moves]
