"""When something happens by itself: a delay is over, a lease ends, a message expires, a record is forgotten."""

from __future__ import annotations

import heapq
from itertools import count

from postroom.broker.memory.copy import Copy

_SLACK = 1000


class Alarms:
    """At most one alarm a copy, earliest first. An entry is void when its copy's ``alarm`` says another time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Copy]] = []
        self._order = count()
        self._void = 0

    @property
    def earliest(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def set(self, copy: Copy, due: float | None) -> None:
        """Look at ``copy`` at ``due``, or earlier if that was asked for before; ``None``: never."""
        if due is not None and copy.alarm is not None and copy.alarm <= due:
            return  # The earlier one finds that nothing is due yet and sets the next: so an extended lease is cheap.
        if copy.alarm is not None:
            self._void += 1
        copy.alarm = due
        if due is not None:
            heapq.heappush(self._heap, (due, next(self._order), copy))
        if self._void > _SLACK and self._void > len(self._heap) // 2:
            # Void entries hold on to messages that are long gone.
            self._heap = [entry for entry in self._heap if entry[2].alarm == entry[0]]
            heapq.heapify(self._heap)
            self._void = 0

    def pop(self, now: float) -> Copy | None:
        """The next copy whose time has come."""
        while self._heap and self._heap[0][0] <= now:
            due, _, copy = heapq.heappop(self._heap)
            if copy.alarm == due:
                copy.alarm = None
                return copy
            self._void -= 1
        return None
