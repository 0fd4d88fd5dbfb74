"""What was seen of a run, by a witness whom no fault reaches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from postroom.broker.base import Outcome
from postroom.message import DeadLetter, JobRecord, JobState, Unique


@dataclass(kw_only=True)
class Order:
    """Something a producer is to publish, and what came of it."""

    label: str
    task: str
    subscriptions: tuple[str, ...]
    key: str | None = None
    delay: float = 0.0
    expires_in: float | None = None
    idempotency_key: str | None = None
    unique: Unique | None = None
    replace: bool = False
    joined: bool = False
    """Within a transaction of a database, together with an entry in its ledger."""
    rolled_back: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    unwanted: bool = False
    """It is to be cancelled."""
    attempted: bool = False
    given_up: bool = False
    tried_at: float = 0.0
    """When it was last attempted."""
    published_at: float | None = None
    """When it was confirmed."""
    ready_at: float = 0.0
    """Not to be run before."""
    ids: set[str] = field(default_factory=set)
    """Under which it was confirmed."""
    cancelled: str = ""
    """The first answer to its cancellation."""
    cancelled_at: float | None = None

    @property
    def told(self) -> str:
        """The label that its handler is told: several orders can be for one message."""
        return str(self.arguments["label"])

    def is_open(self) -> bool:
        """Whether its producer is to publish it, or must try again."""
        if self.published_at is not None or self.given_up:
            return False
        # Whoever has no key to try again with, publishes once; an own transaction shows whether it was committed.
        return not self.attempted or self.idempotency_key is not None


@dataclass(kw_only=True)
class Run:
    """One start of a handler."""

    label: str
    id: str
    subscription: str
    attempt: int
    process: str
    started: float
    ended: float | None = None


@dataclass(kw_only=True)
class Settled:
    """An outcome that was confirmed to a worker."""

    id: str
    subscription: str
    attempt: int
    outcome: Outcome
    process: str
    at: float


@dataclass(kw_only=True)
class Redrive:
    """A person has asked for a dead letter to be handled once more."""

    at: float
    mended: bool
    """Whether it can succeed now."""
    confirmed: bool = False


@dataclass
class Observed:
    """All of it."""

    orders: dict[str, Order] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    troubles: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By process: times in which it was frozen, cut off or told to stop."""
    shown: dict[str, list[tuple[float, JobState, int]]] = field(default_factory=lambda: defaultdict(list))
    """By job id: state and attempt, as they were shown to a client."""
    mended: set[str] = field(default_factory=set)
    """Labels of what fails no longer."""
    redriven: dict[tuple[str, str], list[Redrive]] = field(default_factory=lambda: defaultdict(list))
    """By (id, subscription): when it was asked for."""
    strikes: int = 0
    """How often something befell a process, apart from what handlers do."""
    unexpected: list[str] = field(default_factory=list)
    """Errors that nobody should have seen."""
    records: dict[tuple[str, str], JobRecord] = field(default_factory=dict)
    """By (id, subscription), at the end."""
    letters: dict[tuple[str, str], DeadLetter] = field(default_factory=dict)
    balances: dict[str, int] = field(default_factory=dict)
    ledger: list[tuple[str, int]] = field(default_factory=list)
    """(label, amount) of every effect, in the order in which they were committed."""
    kept: set[str] = field(default_factory=set)
    """Labels of orders whose own transaction was committed."""

    def ended(self, process: str, at: float) -> None:
        """The process is gone, and with it what it ran."""
        for run in self.runs:
            if run.process == process and run.ended is None:
                run.ended = at
