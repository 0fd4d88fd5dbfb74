"""What happened, line by line."""

from __future__ import annotations

import hashlib
from collections import deque

KEPT = 400
"""Lines kept for showing; all count for the digest."""


class Trace:
    """Every fault, statement, publication and run; with ``detailed`` every step of every loop too."""

    def __init__(self, *, detailed: bool = False, keep: int | None = KEPT) -> None:
        """``keep``: how many of the last lines; ``None``: all."""
        self.folder = ""
        """Left out of the lines: it has another name each time."""
        self.detailed = detailed
        self.lines: deque[str] = deque(maxlen=keep)
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, seconds: float, who: str, what: str) -> None:
        line = f"{seconds:12.6f}  {who:<22} {what}"
        if self.folder:
            line = line.replace(self.folder, "")
        self.lines.append(line)
        if self.detailed:
            self._digest.update(line.encode())

    def digest(self) -> str:
        """Of a detailed trace: equal for equal runs."""
        return self._digest.hexdigest()
