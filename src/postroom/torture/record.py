"""The history, sorted by what the checks ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from postroom.testing.history import Event

BROKER = "broker"
"""What is hit by a restart."""
FAULTS = frozenset({"crash", "freeze", "cut", "restart", "stall"})
_ENDS = frozenset({"ack", "dead", "cancel"})
_GIVES_BACK = frozenset({"retry", "release"})
_SETTLES = _ENDS | _GIVES_BACK
_GRACE = 1.0
"""Seconds after an answered settlement in which a fault may still undo it: not every broker confirms an ack."""
_NOTED = 1.0
"""Seconds within which a broker that notes starts has stored the note, on a busy machine."""
_AWAY = 60.0
"""Seconds after which a start that met no broker has given up, on a busy machine."""


class Handed(NamedTuple):
    """One delivery, and how it was settled."""

    delivered: Event
    settles: list[Event]
    """Invocations and answers, in order."""

    @property
    def since(self) -> float:
        """The earliest moment at which it may have been given."""
        return self.delivered.t if self.delivered.asked is None else self.delivered.asked

    @property
    def over(self) -> float:
        """When its settlement was answered; infinite if it never was."""
        answers = [event.t for event in self.settles if event.outcome in ("ok", "fail")]
        return answers[-1] if answers else float("inf")

    @property
    def given_back(self) -> bool:
        return any(event.op in _GIVES_BACK for event in self.settles)


class Copy:
    """One message in one subscription: who was given it, who ran it."""

    def __init__(self) -> None:
        self.handed: list[Handed] = []
        self.starts: list[Event] = []
        self.ends: list[Event] = []

    def take(self, event: Event) -> None:
        if event.op == "deliver":
            self.handed.append(Handed(event, []))
        elif event.op == "start":
            self.starts.append(event)
        elif event.op == "end":
            self.ends.append(event)
        elif event.op in _SETTLES:
            own = self.holder(event)
            if own is not None:
                own.settles.append(event)

    def holder(self, event: Event) -> Handed | None:
        """The delivery that an event belongs to: the latest of its process."""
        own = [each for each in self.handed if each.delivered.consumer == event.consumer]
        return own[-1] if own else None

    def held_at(self, start: Event) -> Handed | None:
        """The delivery under which a handler was started."""
        own = [
            each
            for each in self.handed
            if each.delivered.consumer == start.consumer and each.delivered.t <= start.t
        ]  # fmt: skip
        return own[-1] if own else None

    def end_of(self, start: Event) -> Event | None:
        """Of the handler; ``None`` if it has none."""
        return next((end for end in self.ends if end.consumer == start.consumer and end.t >= start.t), None)

    def failed(self, start: Event) -> bool:
        """Whether it failed, and the broker answered that it counts."""
        end, handed = self.end_of(start), self.held_at(start)
        counted = handed is not None and any(e.op == "retry" and e.outcome == "ok" for e in handed.settles)
        return end is not None and end.outcome == "fail" and counted

    def is_settled(self, start: Event) -> bool:
        """Whether the broker took the settlement of the delivery under which it was started."""
        handed = self.held_at(start)
        return handed is not None and any(event.outcome == "ok" for event in handed.settles)

    @property
    def settled_for_good(self) -> list[Event]:
        """Answers that said so."""
        return [event for each in self.handed for event in each.settles if event.op in _ENDS and event.outcome == "ok"]


class Record:
    """A whole history."""

    def __init__(self, history: Iterable[Event], run: str) -> None:
        self.copies: dict[tuple[str, str], Copy] = defaultdict(Copy)
        """By token and subscription, the latter without the name of the run."""
        self.published: dict[str, list[Event]] = defaultdict(list)
        """By token: invocations and outcomes."""
        self.faults: list[Event] = []
        for event in history:
            if event.op == "publish":
                self.published[event.id].append(event)
            elif event.op in FAULTS:
                self.faults.append(event)
            else:
                self.copies[event.id, event.sub.removeprefix(f"{run}-")].take(event)

    def harmed(self, consumer: str, begin: float, end: float) -> bool:
        """Whether a fault that hit this process, or the broker, fell in that time, or lasted into it."""
        return self.struck(consumer, begin, end) or self.struck(BROKER, begin, end)

    def struck(self, who: str, begin: float, end: float) -> bool:
        """``harmed`` of one alone."""
        return any(
            fault.id == who and fault.t <= end and (fault.until or fault.t) >= begin for fault in self.faults
        )  # fmt: skip

    def cut_off(self, actor: str, at: float) -> bool:
        """Whether it may have had no broker then, or shortly before."""
        return any(
            fault.op in ("cut", "restart")
            and fault.id in (actor, BROKER)
            and fault.t <= at <= (fault.until or fault.t) + _AWAY
            for fault in self.faults
        )

    def excused(self, copy: Copy, first: Event, other_copy: Copy, second: Event) -> bool:
        """Whether a second start is what must be expected: the first failed, or a fault took the message from it."""
        handed = copy.held_at(first)
        if handed is None:
            return False
        if handed.given_back and handed.settles[0].t <= second.t:
            return True
        taken = self.harmed_while_held(copy, first, until=second.t)
        return taken or self.late(other_copy, second, than=first.t)

    def harmed_while_held(self, copy: Copy, start: Event, until: float = float("inf")) -> bool:
        """Whether a fault hit who had started it before its settlement was answered, or just after."""
        handed = copy.held_at(start)
        return handed is not None and self.harmed(start.consumer, handed.since, min(until, handed.over + _GRACE))

    def late(self, copy: Copy, start: Event, than: float = float("inf")) -> bool:
        """Whether it was handed over before the moment ``than``, and started only after a fault had come between."""
        handed = copy.held_at(start)
        return (
            handed is not None
            and handed.since < than
            and self.harmed(start.consumer, handed.since, start.t)
        )  # fmt: skip

    def doubled(self, copy: Copy, until: float) -> bool:
        """Whether two copies may have stayed of it by that time, where giving back is to store a copy and then to let
        the original go."""
        return any(self._doubled_by(copy, handed) for handed in copy.handed if handed.since < until)

    def _doubled_by(self, copy: Copy, handed: Handed) -> bool:
        if not handed.given_back:
            return self._charged_unseen(copy, handed)
        left = handed.settles[0].t
        arrives = min((each.delivered.t for each in copy.handed if each.delivered.t > left), default=left)
        return (
            self.harmed(handed.delivered.consumer, left - _GRACE, handed.over + _GRACE)
            # The copy was stored, and then the original was found to be no longer its own.
            or any(event.outcome == "fail" for event in handed.settles)
            # On its way it is moved by the broker itself, also by storing and letting go.
            or self.struck(BROKER, left - _GRACE, arrives)
            or self._charged_unseen(copy, handed)
        )

    def _charged_unseen(self, copy: Copy, handed: Handed) -> bool:
        """Whether a death was counted for it that took it from no handler: it had only waited in a worker that was
        harmed, to be handed out or while it was given back."""
        mine = handed.delivered
        taken = (
            start.attempt == mine.attempt - 1
            and start.t <= mine.t
            and not copy.is_settled(start)
            and self.harmed_while_held(copy, start, until=mine.t)
            for start in copy.starts
        )
        return mine.suspect and not any(taken) and any(fault.t < mine.t for fault in self.faults)

    def only_killed(self, copy: Copy, first: Event, second: Event) -> bool:
        """Whether all that came between two starts is the death of the first one's process."""
        handed = copy.held_at(first)
        if handed is None or copy.end_of(first) is not None or self.late(copy, second):
            return False
        hits = {
            fault.op
            for fault in self.faults
            if fault.id in (first.consumer, BROKER) and fault.t <= second.t and (fault.until or fault.t) >= handed.since
        }
        return hits == {"crash"}

    def barely_begun(self, copy: Copy, first: Event, second: Event) -> bool:
        """Whether its process was killed before a note of the start can have been stored. Such a death is not charged;
        but what it held is suspect from then on, and of a suspect the start is noted before it is handed out."""
        handed, again = copy.held_at(first), copy.held_at(second)
        return (
            handed is not None
            and not handed.delivered.suspect
            and again is not None
            and again.delivered.suspect
            and any(fault.id == first.consumer and fault.t - first.t < _NOTED for fault in self.faults)
        )

    def relayed_twice(self, until: float) -> bool:
        """Whether a relay was harmed before that time: what it had sent and not removed is sent again."""
        return any((fault.id.startswith("relay") or fault.id == BROKER) and fault.t <= until for fault in self.faults)
