"""Messages of tasks this app does not know: during a rolling deploy another worker may, soon."""

from __future__ import annotations

import time
from collections import OrderedDict

from postroom.broker.base import Delivery, Outcome, Release
from postroom.worker import decide

DELAY = 15.0
"""Seconds until a parked message is offered again, to whichever worker is there."""
GRACE = 600.0
"""Seconds for which this worker goes on parking a message before it makes it a dead letter."""
_REMEMBERED = 10_000


class Parking:
    """Remembers since when each unknown message has been seen; forgets the oldest when there are too many."""

    def __init__(self, grace: float = GRACE, delay: float = DELAY) -> None:
        self._grace = grace
        self._delay = delay
        self._first_seen: OrderedDict[str, float] = OrderedDict()

    def outcome(self, delivery: Delivery) -> Outcome:
        """Release it with a delay, or once the grace is over dead-letter it."""
        now = time.monotonic()
        first = self._first_seen.setdefault(delivery.message.id, now)
        if now - first >= self._grace:
            del self._first_seen[delivery.message.id]
            return decide.unknown(delivery, self._grace)
        if len(self._first_seen) > _REMEMBERED:
            self._first_seen.popitem(last=False)
        return Release(self._delay)
