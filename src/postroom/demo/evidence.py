"""What the photo service itself has on record: its journal and its database. Read here, never written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import msgspec


class Line(msgspec.Struct, frozen=True):
    """One line of the journal: a handler has started, or ended well."""

    at: float
    what: Literal["start", "end"]
    subscription: str
    id: str
    pid: int


class Evidence:
    """The traces that handlers left in the service's directory."""

    def __init__(self, out: Path) -> None:
        self._journal = out / "journal.jsonl"
        self._database = out / "photos.db"
        self._decoder = msgspec.json.Decoder(Line)

    def lines(
        self, what: Literal["start", "end"], *, job_id: str | None = None, subscription: str | None = None
    ) -> list[Line]:
        """The journal's lines of one kind, in the order they were written."""
        if not self._journal.exists():
            return []
        whole = self._journal.read_bytes().rpartition(b"\n")[0]
        found = self._decoder.decode_lines(whole)
        return [
            line
            for line in found
            if line.what == what
            and (job_id is None or line.id == job_id)
            and (subscription is None or line.subscription == subscription)
        ]

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Rows of the service's database, which is there once a worker has started."""
        with closing(sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(query, arguments).fetchall()

    def value(self, query: str, *arguments: object) -> Any:
        """The one value a query gives; ``None`` if it gives none."""
        rows = self.rows(query, *arguments)
        return rows[0][0] if rows else None
