"""When the first and the last handler of a process ran: its speed without its start and its stop."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


class Pulse:
    """Counts handler calls of this process. The floor's handler and Postroom's do the same."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0.0
        self.last = 0.0
        self._stop_after = 0

    def stop_after(self, count: int) -> None:
        """Send SIGTERM to this process after so many calls, and count no further."""
        self._stop_after = count

    def note(self) -> None:
        now = time.monotonic()
        if not self.count:
            self.first = now
        if self.count < self._stop_after or not self._stop_after:
            self.count += 1
            self.last = now
            if self.count == self._stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    def times(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first, "last": self.last}


pulse = Pulse()


def rate(results: list[dict[str, Any]]) -> float:
    """Messages per second of processes that ran together, from the first handler to the last."""
    busy = [item for item in results if item["count"]]
    return float(sum(item["count"] for item in busy) / (max(i["last"] for i in busy) - min(i["first"] for i in busy)))
