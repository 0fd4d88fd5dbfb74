"""Waking workers in other processes: after a commit that made something ready, a byte is written to a file.

The write-ahead log itself changes before a commit can be seen; a bell rung after the commit cannot come too early.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Bell:
    """The file ``<database>.bell``, whose changes :mod:`postroom.broker.sqlite.watch` watches."""

    def __init__(self, database: Path) -> None:
        self.path = Path(f"{database}.bell")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def ring(self) -> None:
        """Tell everybody. Costs one small write to the page cache."""
        # The commit stands, whatever happens here. On a full disk others find the message by their regular looks.
        with suppress(OSError):
            os.pwrite(self._descriptor, b".", 0)

    def close(self) -> None:
        os.close(self._descriptor)
