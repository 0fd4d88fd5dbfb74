"""Finding the next messages of a subscription without looking at any other."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from postroom.broker.sqlite import rows, settle
from postroom.broker.sqlite.schema import EXPIRED

_FIRST_LANE = (
    "SELECT min(lane) FROM message INDEXED BY message_ready WHERE sub = ? AND visible_at IS NOT NULL AND lane > ?"
)
_COLUMNS = f"seq, failures, suspect, line, {rows.MESSAGE}"
_READY = f"""
SELECT {_COLUMNS} FROM message INDEXED BY message_ready
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 0 ORDER BY visible_at, seq LIMIT ?
"""
_SUSPECT = f"""
SELECT {_COLUMNS} FROM message INDEXED BY message_suspect
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 1 ORDER BY visible_at LIMIT 1
"""
_TAKE = """
UPDATE message SET state = 1, lane = lane + 100, visible_at = ?, lease = ?, started_at = ?
WHERE seq IN (SELECT value FROM json_each(?))
"""
_ANY = """
SELECT 1 FROM message INDEXED BY message_ready
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 0 LIMIT 1
"""
_OVERDUE = """
SELECT seq, lease FROM message INDEXED BY message_ready
WHERE sub = ? AND lane = ? AND visible_at <= ? ORDER BY visible_at LIMIT ?
"""
_ANY_SUSPECT = """
SELECT 1 FROM message INDEXED BY message_suspect
WHERE sub = ? AND lane = ? AND visible_at <= ? AND suspect = 1 LIMIT 1
"""
_NEXT = "SELECT min(visible_at) FROM message INDEXED BY message_ready WHERE sub = ? AND lane = ? AND visible_at > ?"
_BEFORE_ALL = -(1 << 31)
_STEP = 500

Row = tuple[Any, ...]
SEQ, FAILURES, SUSPECT, LINE = range(4)
MESSAGE = 4
"""Where the columns of the message begin in a row."""
EXPIRES_AT = MESSAGE + 9


class Claimer:
    """Claims for one subscription, within the transaction of the caller."""

    def __init__(
        self, sub: int, notes_of: Callable[[int], Mapping[tuple[int, int], bool]], worker_of: Callable[[int], str]
    ) -> None:
        """``notes_of(holder)``: whether it had started (seq, lease)."""
        self._sub = sub
        self._notes_of = notes_of
        self._worker_of = worker_of

    def is_any(self, connection: sqlite3.Connection, now: float, *, suspect: bool) -> bool:
        """Whether a claim would find something to do. Only reads."""
        for lane in self._lanes(connection):
            if lane > 0:
                found = connection.execute(_OVERDUE, (self._sub, lane, now, 1)).fetchone()
            else:
                found = connection.execute(_ANY, (self._sub, lane, now)).fetchone()
                if found is None and suspect:
                    found = connection.execute(_ANY_SUSPECT, (self._sub, lane, now)).fetchone()
            if found is not None:
                return True
        return False

    def next_due(self, connection: sqlite3.Connection, now: float) -> float | None:
        """When the next one becomes visible by time alone."""
        times = [connection.execute(_NEXT, (self._sub, lane, now)).fetchone() for lane in self._lanes(connection)]
        return min((row[0] for row in times if row and row[0] is not None), default=None)

    def claim(
        self,
        connection: sqlite3.Connection,
        now: float,
        until: float,
        lease: int,
        limit: int,
        may_have_suspect: Callable[[sqlite3.Connection], bool],
    ) -> list[Row]:
        """Lease up to ``limit`` rows until then, at most one suspect, and none unless ``may_have_suspect`` then."""
        self._take_back(connection, now)
        # Asked only now: what the consumer held may just have been taken back from it.
        suspect = may_have_suspect(connection)
        found: list[Row] = []
        expired = 0
        lane = self._next_lane(connection, _BEFORE_ALL)
        # Many that expire at once are left to the janitor: one transaction must not end them all.
        while lane is not None and lane <= 0 and len(found) < limit and expired < _STEP:
            if suspect and (taken := self._take_suspect(connection, now, until, lease, lane)):
                found += taken
                suspect = False
            ready = connection.execute(_READY, (self._sub, lane, now, limit - len(found))).fetchall()
            taken = self._take(connection, now, until, lease, ready)
            found += taken
            expired += len(ready) - len(taken)
            if len(taken) == len(ready):
                # Else some had expired, and this lane may hold more.
                lane = self._next_lane(connection, lane)
        return found

    def _take_suspect(
        self, connection: sqlite3.Connection, now: float, until: float, lease: int, lane: int
    ) -> list[Row]:
        while ready := connection.execute(_SUSPECT, (self._sub, lane, now)).fetchall():
            if taken := self._take(connection, now, until, lease, ready):
                return taken
        return []

    def _take_back(self, connection: sqlite3.Connection, now: float) -> None:
        """Leases that have ended, before anything else: what was recovered goes ahead."""
        notes: dict[int, Mapping[tuple[int, int], bool]] = {}
        for lane in self._lanes(connection, after=0):
            for seq, lease in connection.execute(_OVERDUE, (self._sub, lane, now, _STEP)).fetchall():
                holder = lease >> 32
                if holder not in notes:
                    notes[holder] = self._notes_of(holder)
                # Of whom nothing is known, it counts: else a message that brings the machine down would never die.
                started = notes[holder].get((seq, lease), True)
                settle.give_back(connection, now, seq, lease, started=started, worker=self._worker_of(holder))

    def _take(
        self, connection: sqlite3.Connection, now: float, until: float, lease: int, ready: list[Row]
    ) -> list[Row]:
        """Lease these, but for those that have expired."""
        usable = []
        for row in ready:
            expires_at = row[EXPIRES_AT]
            if expires_at is not None and expires_at <= now:
                settle.end(connection, now, EXPIRED, row[SEQ])
            else:
                usable.append(row)
        if usable:
            seqs = msgspec.json.encode([row[SEQ] for row in usable]).decode()
            connection.execute(_TAKE, (until, lease, now, seqs))
        return usable

    def _lanes(self, connection: sqlite3.Connection, after: int = _BEFORE_ALL) -> list[int]:
        lanes = []
        lane = self._next_lane(connection, after)
        while lane is not None:
            lanes.append(lane)
            lane = self._next_lane(connection, lane)
        return lanes

    def _next_lane(self, connection: sqlite3.Connection, after: int) -> int | None:
        row = connection.execute(_FIRST_LANE, (self._sub, after)).fetchone()
        return None if row is None else row[0]
