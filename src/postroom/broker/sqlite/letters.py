"""Dead letters, and the other things a person may do to a subscription."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

import msgspec

from postroom.broker.base import SubscriptionStats
from postroom.broker.sqlite import rows, settle
from postroom.broker.sqlite.filetime import FileClock
from postroom.broker.sqlite.publish import copy_retained
from postroom.broker.sqlite.routing import matches
from postroom.broker.sqlite.schema import CANCELLED, DEAD, LEASED, WAITING
from postroom.message import DeadLetter, Message

_LETTER = f"SELECT seq, finished_at, redriven, {rows.MESSAGE} FROM message"
_REVIVE = """
UPDATE message SET state = 0, failures = 0, suspect = 0, cancel = 0, due = ?1, visible_at = ?1, lease = 0, line = ?2,
    finished_at = NULL, purge_at = NULL, result = NULL, progress = NULL, expires_at = NULL
WHERE seq = ?3
"""
PURGE_STEP = 5000
"""Messages that one transaction of a purge ends."""
_LINED_UP = """
SELECT seq, line FROM message INDEXED BY message_line
WHERE sub = ? AND line IS NOT NULL AND state = 0 AND seq <= ? LIMIT ?
"""
_WAITING_IN_LANES = """
SELECT seq, line FROM message INDEXED BY message_ready
WHERE sub = ? AND lane <= 0 AND visible_at IS NOT NULL AND seq <= ? LIMIT ?
"""
_PURGE = """
UPDATE message SET state = ?, visible_at = NULL, line = NULL, suspect = 0, body = NULL, finished_at = ?,
    purge_at = ? + result_ttl
WHERE seq IN (SELECT value FROM json_each(?))
"""

_message = msgspec.json.Decoder(Message)


def page(
    connection: sqlite3.Connection, sub: int, name: str, ids: Sequence[str] | None, after: str | None, limit: int
) -> list[DeadLetter]:
    """Oldest first: those of ``ids``, or those that follow ``after``."""
    if ids is not None:
        found = [
            row
            for job_id in ids
            for row in connection.execute(f"{_LETTER} WHERE id = ? AND sub = ? AND state = 3", (job_id, sub)).fetchall()
        ]
        found.sort(key=lambda row: (row[1], row[0]))
    else:
        place: tuple[float, int] = (-1.0, -1)
        if after is not None:
            last = connection.execute(
                "SELECT finished_at, seq FROM message WHERE id = ? AND sub = ?", (after, sub)
            ).fetchone()
            place = place if last is None or last[0] is None else last
        found = connection.execute(
            f"{_LETTER} INDEXED BY message_dead WHERE sub = ? AND state = 3 AND (finished_at, seq) > (?, ?) "
            "ORDER BY finished_at, seq LIMIT ?",
            (sub, *place, limit),
        ).fetchall()
    return [rows.dead_letter(connection, row, name) for row in found]


def redrive(connection: sqlite3.Connection, clock: FileClock, sub: int, ordered: bool, ids: Sequence[str]) -> list[str]:
    """Dead letters back into the queue. Returns the ids that were dead until now."""
    moved = []
    for job_id in ids:
        row = connection.execute(
            "SELECT seq, key FROM message WHERE id = ? AND sub = ? AND state = ?", (job_id, sub, DEAD)
        ).fetchone()
        if row is not None:
            connection.execute("UPDATE message SET redriven = redriven + 1 WHERE seq = ?", (row[0],))
            _revive(connection, clock, sub, row[0], row[1] if ordered else None)
            moved.append(job_id)
    return moved


def discard(connection: sqlite3.Connection, sub: int, ids: Sequence[str]) -> list[str]:
    """Delete dead letters. Returns the ids that were dead until now."""
    gone = []
    for job_id in ids:
        row = connection.execute(
            "DELETE FROM message WHERE id = ? AND sub = ? AND state = ? RETURNING seq", (job_id, sub, DEAD)
        ).fetchone()
        if row is not None:
            connection.execute("DELETE FROM failure WHERE seq = ?", row)
            gone.append(job_id)
    return gone


def newest(connection: sqlite3.Connection) -> int:
    """The ``seq`` of the message published last."""
    return int(connection.execute("SELECT coalesce(max(seq), 0) FROM message").fetchone()[0])


def purge(connection: sqlite3.Connection, sub: int, now: float, up_to: int) -> int:
    """End some of what waits, none of it newer than ``up_to``. Returns how many, 0 when it is done.

    The rows stay as records: an id that was given out is never unknown.
    """
    found = connection.execute(_LINED_UP, (sub, up_to, PURGE_STEP)).fetchall()
    found = found or connection.execute(_WAITING_IN_LANES, (sub, up_to, PURGE_STEP)).fetchall()
    seqs = msgspec.json.encode([seq for seq, _ in found]).decode()
    connection.execute(_PURGE, (CANCELLED, now, now, seqs))
    connection.execute("UPDATE subscription SET live = live - ? WHERE id = ?", (len(found), sub))
    for line in {line for _, line in found if line is not None}:
        # Something newer of that key may have come meanwhile.
        settle.advance(connection, sub, line)
    return len(found)


def unsubscribe(connection: sqlite3.Connection, sub: int, name: str) -> None:
    """Delete a subscription and all it holds; a queue with it, which would accept jobs and drop them."""
    connection.execute("DELETE FROM failure WHERE seq IN (SELECT seq FROM message WHERE sub = ?)", (sub,))
    connection.execute("DELETE FROM message WHERE sub = ?", (sub,))
    connection.execute("DELETE FROM subscription WHERE id = ?", (sub,))
    connection.execute("DELETE FROM topic WHERE name = ? AND queue = 1", (name,))
    connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")


def replay(connection: sqlite3.Connection, clock: FileClock, sub: int, since: float | None) -> int:
    """Retained messages once more; those that have not ended yet are left alone."""
    pattern, where, ordered = connection.execute(
        "SELECT pattern, filter, ordered FROM subscription WHERE id = ?", (sub,)
    ).fetchone()
    wanted = msgspec.json.decode(where) if where else {}
    count = 0
    for message in retained(connection, pattern, wanted, clock, since):
        row = connection.execute(
            "SELECT seq, state FROM message WHERE id = ? AND sub = ?", (message.id, sub)
        ).fetchone()
        if row is None:
            count += copy_retained(connection, clock, message, sub, bool(ordered))
        elif row[1] not in (WAITING, LEASED):
            connection.execute("UPDATE message SET body = ? WHERE seq = ?", (message.body, row[0]))
            _revive(connection, clock, sub, row[0], message.key if ordered else None)
            count += 1
    return count


def retained(
    connection: sqlite3.Connection, pattern: str, where: dict[str, str], clock: FileClock, since: float | None
) -> Iterator[Message]:
    """What the log holds for a subscription, oldest first."""
    topics = [
        name for (name,) in connection.execute("SELECT name FROM topic WHERE queue = 0") if matches(pattern, name)
    ]
    now = clock.now()
    begin = 0.0 if since is None else clock.convert(since)
    found = connection.execute(
        "SELECT message FROM log WHERE topic IN (SELECT value FROM json_each(?)) "
        "AND published_at >= ? AND purge_at > ? ORDER BY seq",
        (msgspec.json.encode(topics).decode(), begin, now),
    )
    for (text,) in found:
        # One by one: a day of events need not fit into memory.
        message = _message.decode(text)
        if all(message.headers.get(name) == value for name, value in where.items()) and (
            message.expires_at is None or clock.convert(message.expires_at) > now
        ):
            yield message


def stats(connection: sqlite3.Connection, now: float) -> list[SubscriptionStats]:
    """Every subscription in numbers: ranges of the index are counted, no row is read."""
    declared = connection.execute(
        "SELECT s.id, s.name, s.pattern, coalesce(t.queue, 0), s.live FROM subscription AS s "
        "LEFT JOIN topic AS t ON t.name = s.pattern ORDER BY s.name"
    ).fetchall()
    return [_stats_of(connection, now, *row) for row in declared]


def _stats_of(
    connection: sqlite3.Connection, now: float, sub: int, name: str, pattern: str, queue: int, live: int
) -> SubscriptionStats:
    ready, running = connection.execute(
        "SELECT count(*) FILTER (WHERE lane <= 0 AND visible_at <= ?2), count(*) FILTER (WHERE lane > 0) "
        "FROM message INDEXED BY message_ready WHERE sub = ?1 AND visible_at IS NOT NULL",
        (sub, now),
    ).fetchone()
    (dead,) = connection.execute(
        "SELECT count(*) FROM message INDEXED BY message_dead WHERE sub = ? AND state = 3", (sub,)
    ).fetchone()
    (oldest,) = connection.execute(
        "SELECT min(due) FROM (SELECT due FROM message INDEXED BY message_ready WHERE sub = ? AND visible_at <= ? "
        "AND lane <= 0 LIMIT 100)",
        (sub, now),
    ).fetchone()
    return SubscriptionStats(
        name=name,
        pattern=pattern,
        queue=bool(queue),
        ready=ready,
        delayed=max(0, live - ready - running),
        running=running,
        dead=dead,
        oldest=None if oldest is None else max(0.0, now - oldest),
    )


def _revive(connection: sqlite3.Connection, clock: FileClock, sub: int, seq: int, line: str | None) -> None:
    """A message that had ended runs again, with its attempts counted from 1."""
    connection.execute(_REVIVE, (clock.now(), line, seq))
    connection.execute("UPDATE subscription SET live = live + 1 WHERE id = ?", (sub,))
    if line is not None:
        # It may stand before or behind others of its key: only the first may be visible.
        connection.execute("UPDATE message SET visible_at = NULL WHERE seq = ?", (seq,))
        settle.advance(connection, sub, line)
