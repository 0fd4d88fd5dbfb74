"""How far a run is, read from its history files while they are written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from postroom.testing.history import Event


class Tail:
    """Reads on in all files of a folder at every look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: Counter[Path] = Counter()
        self.sent: set[str] = set()
        """Tokens whose publication was confirmed."""
        self.ended: set[tuple[str, str]] = set()
        """Token and subscription of what was acked or is dead, or may be."""
        self.faults = 0

    def look(self) -> None:
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._places[path])
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._places[path] += len(whole) + 1
                for line in whole.splitlines():
                    self._take(msgspec.json.decode(line, type=Event))

    def _take(self, event: Event) -> None:
        if event.op == "publish" and event.outcome == "ok":
            self.sent.add(event.id)
        elif event.op in ("ack", "dead") and event.outcome != "fail":
            self.ended.add((event.id, event.sub))
        elif event.op in ("crash", "freeze", "cut", "restart") and event.outcome == "ok":
            self.faults += 1
