"""Storing messages: a row for each subscription, one for the log, one for an idempotency key."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec

from postroom.broker.sqlite import settle
from postroom.broker.sqlite.filetime import FileClock
from postroom.broker.sqlite.routing import Destination, Route, Routes
from postroom.broker.sqlite.schema import CANCELLED, SUCCEEDED, WAITING
from postroom.errors import IdempotencyConflict, PostroomError, QueueFull, TopicNotFound
from postroom.message import Message, Unique

_INSERT = """
INSERT OR IGNORE INTO message
    (sub, lane, visible_at, due, state, id, line, topic, name, body, headers, key,
     created_at, not_before, expires_at, result_ttl, idempotency_key, dedup_window, finished_at, purge_at)
VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)
"""
_INSERT_BARE = """
INSERT OR IGNORE INTO message
    (sub, lane, visible_at, due, state, id, topic, name, body, created_at, result_ttl, dedup_window)
VALUES (?,?,?,?,0,?,?,?,?,?,?,?)
"""
_LOG = "INSERT INTO log (topic, published_at, purge_at, message) VALUES (?, ?, ?, ?)"
_IN_LINE = "SELECT 1 FROM message WHERE sub = ? AND line = ? LIMIT 1"
_KNOWN_ID = "SELECT 1 FROM message WHERE id = ? LIMIT 1"
_KNOWN_KEY = "SELECT id, fingerprint FROM dedup WHERE topic = ? AND key = ? AND until > ?"
_REMEMBER_KEY = "REPLACE INTO dedup VALUES (?, ?, ?, ?, ?)"
_HOLDER = (
    "SELECT m.seq FROM dedup AS d JOIN message AS m ON m.id = d.id WHERE d.topic = ? AND d.key = ? "
    "AND (m.expires_at IS NULL OR m.expires_at > ? OR m.state = 1)"
)
_HOLDS: dict[Unique | None, str] = {
    "until_done": f"{_HOLDER} AND m.state IN (0, 1)",
    "until_started": f"{_HOLDER} AND m.state = 0 AND m.failures = 0",
}
_LIVE = "UPDATE subscription SET live = live + ? WHERE id = ?"

_Run = tuple[str, list[tuple[Any, ...]]]
"""A statement, and rows in a row that it inserts."""

NO_SUBSCRIPTION = 0
"""The ``sub`` of the record of a message that nobody wanted."""


class Publication:
    """One batch on its way into the file, through any connection to it."""

    def __init__(self, connection: sqlite3.Connection, routes: Routes, clock: FileClock) -> None:
        self._connection = connection
        self._routes = routes
        self._clock = clock
        self._now = clock.now()
        self._room: dict[int, int] = {}
        self._begin()
        self._keys: dict[tuple[str, str], tuple[str, bytes]] = {}

    def _begin(self) -> None:
        self._runs: dict[int, list[_Run]] = {}
        self._logged: list[tuple[Any, ...]] = []
        self._lines: set[tuple[int, str]] = set()

    def store(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        """Returns the id or the error of each."""
        self._routes.refresh(self._connection)
        answers: list[str | PostroomError] = []
        for message in messages:
            route = self._only_route(message)
            if route is None:
                answers.append(self._add(message))
            else:
                self._put(route.id, _INSERT_BARE, self._bare_row(message, route.id))
                answers.append(message.id)
        self._write()
        return answers

    def _only_route(self, message: Message) -> Route | None:
        """The subscription of a message that goes to one queue and asks for nothing: the common case, made cheap."""
        destination = self._routes.destination(message.topic)
        if destination is None or destination.plain is None:
            return None
        if message.headers or message.key is not None or message.idempotency_key is not None:
            return None
        if message.not_before is not None or message.expires_at is not None:
            return None
        return destination.plain

    def _bare_row(self, message: Message, sub: int) -> tuple[Any, ...]:
        now = self._now
        # The driver looks for an adapter for each ``bytes``, but not for a ``bytearray``: a fifth of an insert.
        return (
            sub, -message.priority, now, now, message.id, message.topic, message.name, bytearray(message.body),
            message.created_at, message.result_ttl, message.dedup_window,
        )  # fmt: skip

    def _put(self, sub: int, sql: str, row: tuple[Any, ...]) -> None:
        """Behind the rows of the same subscription: they are inserted in the order of the batch."""
        runs = self._runs.setdefault(sub, [])
        if not runs or runs[-1][0] is not sql:
            runs.append((sql, []))
        runs[-1][1].append(row)

    def _add(self, message: Message) -> str | PostroomError:
        destination = self._routes.destination(message.topic)
        if destination is None:
            return TopicNotFound(f"no topic or queue {message.topic!r} was ever declared on this broker")
        replaced: list[int] = []
        if message.unique is not None:
            # Whether it is held is told by rows: those of this batch must be among them.
            self._write()
            if message.replace and self._connection.execute(_KNOWN_ID, (message.id,)).fetchone():
                # Published before: what came after it keeps the key.
                return message.id
            replaced = self._replaced_by(message)
        if message.idempotency_key is not None and not replaced:
            known = self._known(message)
            if known is not None:
                return known
        full = None if replaced else self._refusal(message, destination)
        if full is not None:
            return full
        for seq in replaced:
            settle.end(self._connection, self._now, CANCELLED, seq)
        if message.idempotency_key is not None:
            self._remember(message)
        wanted = False
        for route in destination.routes:
            if route.wants(message.headers):
                wanted = True
                self._put(route.id, _INSERT, self._row(message, route.id, route.ordered))
        if destination.retention > 0:
            self._log(message, destination.retention)
        if not wanted:
            kept = destination.retention or message.result_ttl
            row = (*self._row(message, NO_SUBSCRIPTION, False)[:2], None, *self._ended(message, kept))
            self._put(NO_SUBSCRIPTION, _INSERT, row)
        return message.id

    def _row(self, message: Message, sub: int, ordered: bool) -> tuple[Any, ...]:
        due = self._now if message.not_before is None else max(self._now, self._clock.convert(message.not_before))
        line = message.key if ordered else None
        return (
            sub,
            -message.priority,
            None if line is not None and self._is_behind(sub, line) else due,
            due,
            WAITING,
            message.id,
            line,
            message.topic,
            message.name,
            message.body,
            encode_headers(message),
            message.key,
            message.created_at,
            message.not_before,
            None if message.expires_at is None else self._clock.convert(message.expires_at),
            message.result_ttl,
            message.idempotency_key,
            message.dedup_window,
            None,
            None,
        )

    def _ended(self, message: Message, kept: float) -> tuple[Any, ...]:
        """The rest of the row of a message that no subscription wanted."""
        return (
            self._now, SUCCEEDED, message.id, None, message.topic, message.name, None, None, message.key,
            message.created_at, None, None, message.result_ttl, message.idempotency_key, message.dedup_window,
            self._now, self._now + kept,
        )  # fmt: skip

    def _is_behind(self, sub: int, line: str) -> bool:
        """Whether an earlier message of the same key is unsettled; from now on there is one."""
        if (sub, line) in self._lines:
            return True
        self._lines.add((sub, line))
        return self._connection.execute(_IN_LINE, (sub, line)).fetchone() is not None

    def _refusal(self, message: Message, destination: Destination) -> QueueFull | None:
        limited = [route for route in destination.routes if route.maximum is not None and route.wants(message.headers)]
        for route in limited:
            if route.id not in self._room:
                self._room[route.id] = self._count_room(route)
            if self._room[route.id] <= 0:
                return QueueFull(f"{route.name} holds its maximum of {route.maximum} messages; try again later")
        for route in limited:
            self._room[route.id] -= 1
        return None

    def _count_room(self, route: Route) -> int:
        """Places left in a subscription with a maximum; what has expired in it makes room first."""
        settle.expire(self._connection, self._now, route.maximum or 0, route.id)
        (live,) = self._connection.execute("SELECT live FROM subscription WHERE id = ?", (route.id,)).fetchone()
        return (route.maximum or 0) - int(live)

    def _known(self, message: Message) -> str | PostroomError | None:
        """What an earlier message with the same idempotency key means for this one."""
        place = (message.topic, str(message.idempotency_key))
        found = self._keys.get(place)
        if found is None:
            found = self._connection.execute(_KNOWN_KEY, (*place, self._now)).fetchone()
        if found is None or (message.unique is not None and not self._held(message)):
            return None
        if bytes(found[1]) != fingerprint(message):
            return IdempotencyConflict(
                f"the idempotency key {message.idempotency_key!r} was used before for another {message.topic} message; "
                "use a new key for a new payload"
            )
        return str(found[0])

    def _remember(self, message: Message) -> None:
        place = (message.topic, str(message.idempotency_key))
        mark = fingerprint(message)
        self._keys[place] = (message.id, mark)
        until = inf if message.unique is not None else self._now + message.dedup_window
        self._connection.execute(_REMEMBER_KEY, (*place, message.id, mark, until))

    def _replaced_by(self, message: Message) -> list[int]:
        return self._held(message) if message.replace else []

    def _held(self, message: Message) -> list[int]:
        """The rows that hold the key of a unique message."""
        found = self._connection.execute(_HOLDS[message.unique], (message.topic, message.idempotency_key, self._now))
        return [seq for (seq,) in found]

    def _log(self, message: Message, retention: float) -> None:
        self._logged.append(
            (
                message.topic,
                self._now,
                self._now + retention,
                msgspec.json.encode(msgspec.structs.replace(message, headers=dict(message.headers))),
            )
        )

    def _write(self) -> None:
        connection = self._connection
        known: set[int] = set()
        for sub, runs in self._runs.items():
            added = 0
            for sql, rows in runs:
                before = connection.total_changes
                connection.executemany(sql, rows)
                added += connection.total_changes - before
                if connection.total_changes - before < len(rows):
                    known.add(sub)
            if added and sub != NO_SUBSCRIPTION:
                connection.execute(_LIVE, (added, sub))
        for sub, line in self._lines:
            if sub in known:
                # What others of its key were put behind may be known already, and done.
                settle.advance(connection, sub, line)
        if self._logged:
            connection.executemany(_LOG, self._logged)
        self._begin()


def copy_retained(connection: sqlite3.Connection, clock: FileClock, message: Message, sub: int, ordered: bool) -> bool:
    """Give a retained message to one subscription; false if it holds or remembers it already."""
    now = clock.now()
    line = message.key if ordered else None
    behind = line is not None and connection.execute(_IN_LINE, (sub, line)).fetchone() is not None
    before = connection.total_changes
    connection.execute(
        _INSERT,
        (
            sub, -message.priority, None if behind else now, now, WAITING, message.id, line, message.topic,
            message.name, message.body, encode_headers(message), message.key, message.created_at, None,
            None if message.expires_at is None else clock.convert(message.expires_at), message.result_ttl,
            message.idempotency_key, message.dedup_window, None, None,
        ),
    )  # fmt: skip
    added: int = connection.total_changes - before
    if added:
        connection.execute(_LIVE, (added, sub))
        connection.execute("DELETE FROM message WHERE id = ? AND sub = ?", (message.id, NO_SUBSCRIPTION))
    return bool(added)


def encode_headers(message: Message) -> str | None:
    return msgspec.json.encode(message.headers).decode() if message.headers else None


def fingerprint(message: Message) -> bytes:
    """What two messages under one idempotency key must share."""
    return hashlib.sha256(message.name.encode() + b"\0" + message.body).digest()
