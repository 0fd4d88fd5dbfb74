"""What a run has shown, arranged for the checks; and what the faults of the run excuse."""

from __future__ import annotations

from collections import defaultdict

from postroom.message import JobRecord, JobState
from postroom.testing.simulation.app import LEASE
from postroom.testing.simulation.observed import Observed, Order, Run


class Judge:
    def __init__(self, seen: Observed, *, shared_file: bool, clock_was_set: bool) -> None:
        """``shared_file``: who freezes with the file locked holds everybody up."""
        self.seen = seen
        self.clock_was_set = clock_was_set
        self._shared_file = shared_file
        self.runs_of: dict[str, list[Run]] = defaultdict(list)
        """By what the handler is told."""
        for run in seen.runs:
            self.runs_of[run.label].append(run)
        self.orders_of: dict[str, list[Order]] = defaultdict(list)
        """The same."""
        for order in seen.orders.values():
            self.orders_of[order.told].append(order)

    def runs(self, order: Order) -> list[Run]:
        """Of an order that is alone with its label, or shares its message."""
        return [run for run in self.runs_of[order.told] if order.unique is None or run.id in order.ids]

    def records(self, order: Order, subscription: str) -> list[JobRecord]:
        """Of the messages that it was confirmed as."""
        found = [self.seen.records.get((id, subscription)) for id in sorted(order.ids)]
        return [record for record in found if record is not None]

    def state(self, order: Order) -> JobState | None:
        """Of a job."""
        return next((record.state for record in self.records(order, order.subscriptions[0])), None)

    def troubled(self, run: Run, until: float) -> bool:
        """Whether it may have lost its lease, or the right to run, by then."""
        processes = list(self.seen.troubles) if self._shared_file else [run.process]
        return any(
            since <= until and end >= run.started - 2 * LEASE
            for process in processes
            for since, end in self.seen.troubles.get(process, ())
        )

    def redriven_between(self, run: Run, later: Run) -> bool:
        return any(
            run.started <= redrive.at <= later.started
            for redrive in self.seen.redriven.get((run.id, run.subscription), ())
        )
