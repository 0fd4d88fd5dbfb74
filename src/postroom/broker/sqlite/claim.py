"""Finding the next messages of a subscription without looking at any other."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec

from postroom.broker.sqlite import rows, settle
from postroom.broker.sqlite.schema import EXPIRED

_FIRST_LANE = (
    "SELECT min(lane) FROM message INDEXED BY message_ready WHERE sub = ? AND visible_at IS NOT NULL AND lane > ?"
)
_COLUMNS = f"seq, lease, failures, suspect, cancel, line, {rows.MESSAGE}"
_READY = f"""
SELECT {_COLUMNS} FROM message INDEXED BY message_ready
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 0 ORDER BY visible_at, seq LIMIT ?
"""
_SUSPECT = f"""
SELECT {_COLUMNS} FROM message INDEXED BY message_suspect
WHERE sub = ? AND suspect = 1 AND visible_at <= ? ORDER BY visible_at LIMIT 1
"""
_TAKE = """
UPDATE message SET state = 1, visible_at = ?, lease = ?, started_at = ?
WHERE seq IN (SELECT value FROM json_each(?))
"""
_ANY = """
SELECT 1 FROM message INDEXED BY message_ready
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 0 LIMIT 1
"""
_ANY_SUSPECT = (
    "SELECT 1 FROM message INDEXED BY message_suspect WHERE sub = ? AND suspect = 1 AND visible_at <= ? LIMIT 1"
)
_NEXT = "SELECT min(visible_at) FROM message INDEXED BY message_ready WHERE sub = ? AND lane = ? AND visible_at > ?"
_BEFORE_ALL = -(1 << 31)

Row = tuple[Any, ...]
SEQ, LEASE, FAILURES, SUSPECT, CANCEL, LINE = range(6)
MESSAGE = 6
"""Where the columns of the message begin in a row."""


class Claimer:
    """Claims for one subscription, within the transaction of the caller."""

    def __init__(self, sub: int, was_started: Callable[[int, int], bool], worker_of: Callable[[int], str]) -> None:
        """``was_started(seq, lease)``: what the former holder had noted of an expired lease."""
        self._sub = sub
        self._was_started = was_started
        self._worker_of = worker_of

    def is_any(self, connection: sqlite3.Connection, now: float, *, suspect: bool) -> bool:
        """Whether a claim would find something. Only reads."""
        if suspect and connection.execute(_ANY_SUSPECT, (self._sub, now)).fetchone():
            return True
        return any(connection.execute(_ANY, (self._sub, lane, now)).fetchone() for lane in self._lanes(connection))

    def next_due(self, connection: sqlite3.Connection, now: float) -> float | None:
        """When the next one becomes visible by time alone."""
        times = [connection.execute(_NEXT, (self._sub, lane, now)).fetchone() for lane in self._lanes(connection)]
        return min((row[0] for row in times if row and row[0] is not None), default=None)

    def claim(
        self, connection: sqlite3.Connection, now: float, until: float, lease: int, limit: int, *, suspect: bool
    ) -> list[Row]:
        """Lease up to ``limit`` rows until then, at most one suspect, and none unless ``suspect`` allows it."""
        found: list[Row] = []
        if suspect:
            found += self._usable(connection, now, connection.execute(_SUSPECT, (self._sub, now)).fetchall())
        lane = self._next_lane(connection, _BEFORE_ALL)
        while lane is not None and len(found) < limit:
            batch = connection.execute(_READY, (self._sub, lane, now, limit - len(found))).fetchall()
            usable = self._usable(connection, now, batch)
            found += usable
            # Some were expired or given back: this lane may hold more.
            if len(usable) == len(batch):
                lane = self._next_lane(connection, lane)
        if found:
            taken = msgspec.json.encode([row[SEQ] for row in found]).decode()
            connection.execute(_TAKE, (until, lease, now, taken))
        return found

    def _usable(self, connection: sqlite3.Connection, now: float, found: list[Row]) -> list[Row]:
        """Those to be delivered; the others are dealt with here."""
        usable = []
        for row in found:
            expires_at = row[MESSAGE + 9]
            if row[LEASE]:
                started = self._was_started(row[SEQ], row[LEASE])
                settle.give_back(
                    connection, now, row[SEQ], row[LEASE], started=started, worker=self._worker_of(row[LEASE] >> 32)
                )
            elif expires_at is not None and expires_at <= now:
                self.end(connection, now, EXPIRED, row[SEQ], row[LINE])
            else:
                usable.append(row)
        return usable

    def end(self, connection: sqlite3.Connection, now: float, state: int, seq: int, line: str | None) -> None:
        """End a waiting message that will not run."""
        if settle.end(connection, now, state, seq, 0):
            connection.execute("UPDATE subscription SET live = live - 1 WHERE id = ?", (self._sub,))
            if line is not None:
                settle.advance(connection, self._sub, line)

    def _lanes(self, connection: sqlite3.Connection) -> list[int]:
        lanes = []
        lane = self._next_lane(connection, _BEFORE_ALL)
        while lane is not None:
            lanes.append(lane)
            lane = self._next_lane(connection, lane)
        return lanes

    def _next_lane(self, connection: sqlite3.Connection, after: int) -> int | None:
        row = connection.execute(_FIRST_LANE, (self._sub, after)).fetchone()
        return None if row is None else row[0]
