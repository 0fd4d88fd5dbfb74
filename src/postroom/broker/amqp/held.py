"""A message the server has handed over."""

from __future__ import annotations

from postroom.broker.amqp.subscriber import Subscriber
from postroom.broker.amqp.wire import Copy


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
