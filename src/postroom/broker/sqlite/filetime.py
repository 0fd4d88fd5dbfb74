"""The clock of a file: all processes on it agree, and setting the machine's clock does not move it."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from postroom.clock import Clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MONOTONIC = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


class FileClock:
    """Unix time as it was when the first process after the last boot opened the file, counted on monotonically.

    A machine without a boot id, and a clock that is injected, are believed as they are.
    """

    def __init__(self, clock: Clock, *, injected: bool) -> None:
        self._clock = clock
        self._injected = injected
        self._offset: float | None = None

    def agree(self, connection: sqlite3.Connection) -> bool:
        """Take over what the file says, if it was said since the machine's last boot. Only reads."""
        boot = boot_id()
        if self._injected or boot is None or _MONOTONIC is None:
            return True
        row = connection.execute("SELECT value FROM meta WHERE key = 'clock'").fetchone()
        known, _, offset = str(row[0]).partition(" ") if row else ("", "", "")
        if known == boot:
            self._offset = float(offset)
        return known == boot

    def anchor(self, connection: sqlite3.Connection) -> None:
        """Agree with the file, or be the first to tell it. Within a write transaction."""
        if not self.agree(connection) and _MONOTONIC is not None:
            self._offset = self._clock.now() - time.clock_gettime(_MONOTONIC)
            connection.execute("REPLACE INTO meta VALUES ('clock', ?)", (f"{boot_id()} {self._offset!r}",))

    def now(self) -> float:
        """Seconds; comparable among all processes on the file."""
        if self._offset is None or _MONOTONIC is None:
            return self._clock.now()
        return time.clock_gettime(_MONOTONIC) + self._offset

    def convert(self, unix: float) -> float:
        """A unix time, as seen by the machine's clock now, on this clock."""
        return unix if self._offset is None else unix + (self.now() - self._clock.now())


def boot_id() -> str | None:
    """What identifies the running boot of this machine; ``None`` where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None
