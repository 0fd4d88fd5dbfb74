"""A message the server has handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.subscriber import Subscriber


class Held:
    """A message the server has handed over: in the buffer, under a lease, or settled."""

    __slots__ = ("copy", "is_settled", "is_settling", "since", "source", "started", "tag", "until")

    def __init__(self, copy: Copy, source: Subscriber, tag: int, until: float) -> None:
        self.copy = copy
        self.source = source
        self.tag = tag
        self.until = until
        """Loop time: while in the buffer when it came, then when its lease ends."""
        self.since = until
        """Loop time since which the server has waited for it."""
        self.started = False
        self.is_settling = False
        self.is_settled = False

    @property
    def is_ours(self) -> bool:
        """Whether the server still waits for us to settle it."""
        return self.source.holds(self.tag)


def ack(held: Sequence[Held]) -> None:
    """Let the server forget these. What was lost with its connection is left out."""
    by_source: dict[Subscriber, list[int]] = {}
    for one in held:
        if one.source.is_alive:
            by_source.setdefault(one.source, []).append(one.tag)
    for source, tags in by_source.items():
        source.ack(tags)


def line_up(held: Held, line: deque[Held]) -> None:
    """The more urgent before the others; the server hands them over so, but not if they were published meanwhile."""
    priority = held.copy.message.priority
    place = len(line)
    while place and line[place - 1].copy.message.priority < priority:
        place -= 1
    line.insert(place, held)
