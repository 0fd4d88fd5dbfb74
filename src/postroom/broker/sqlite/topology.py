"""Declaring topics and subscriptions."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqlite.filetime import FileClock
from postroom.broker.sqlite.letters import retained
from postroom.broker.sqlite.publish import copy_retained
from postroom.errors import ConfigurationError


class Declaration:
    """What is to be declared; finds out first whether it changes anything, for a declaration mostly does not."""

    def __init__(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription], clock: FileClock) -> None:
        self._topics = topics
        self._subscriptions = subscriptions
        self._clock = clock

    def changes(self, connection: sqlite3.Connection) -> bool:
        """Whether anything differs from what stands in the file. Only reads."""
        topics = dict(connection.execute("SELECT name, queue || ' ' || retention FROM topic").fetchall())
        known = {row[0]: row[1:] for row in connection.execute(_KNOWN).fetchall()}
        return any(
            topics.get(topic.name) != f"{int(topic.queue)} {float(topic.retention)}" for topic in self._topics
        ) or any(known.get(item.name) != _columns(item) for item in self._subscriptions)

    def store(self, connection: sqlite3.Connection) -> None:
        """Raises ``ConfigurationError`` if a queue would get a second subscription, or change its kind."""
        for topic in self._topics:
            self._store_topic(connection, topic)
        for subscription in self._subscriptions:
            self._store_subscription(connection, subscription)
        self._refuse_empty(connection)
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")

    def _store_topic(self, connection: sqlite3.Connection, topic: Topic) -> None:
        known = connection.execute("SELECT queue FROM topic WHERE name = ?", (topic.name,)).fetchone()
        if known is not None and bool(known[0]) != topic.queue:
            before = "queue" if known[0] else "topic"
            raise ConfigurationError(f"{topic.name!r} is a {before} on this broker already; choose another name")
        if topic.queue:
            self._refuse_second(connection, topic.name)
        connection.execute(
            "REPLACE INTO topic VALUES (?, ?, ?)", (topic.name, int(topic.queue), float(topic.retention))
        )

    def _store_subscription(self, connection: sqlite3.Connection, item: Subscription) -> None:
        queue = connection.execute(
            "SELECT name FROM topic WHERE name IN (?, ?) AND queue = 1", (item.pattern, item.name)
        ).fetchone()
        if queue is not None and item.name != item.pattern:
            raise ConfigurationError(
                f"{queue[0]!r} is a queue: it has one subscription only, named like it, so {item.name!r} of "
                f"{item.pattern!r} cannot be one"
            )
        known = connection.execute("SELECT id FROM subscription WHERE name = ?", (item.name,)).fetchone()
        columns = _columns(item)
        if known is not None:
            connection.execute(
                "UPDATE subscription SET pattern = ?, filter = ?, ordered = ?, maximum = ? WHERE id = ?",
                (*columns, known[0]),
            )
            return
        cursor = connection.execute(
            "INSERT INTO subscription (pattern, filter, ordered, maximum, name) VALUES (?, ?, ?, ?, ?)",
            (*columns, item.name),
        )
        if item.start == "earliest" and cursor.lastrowid is not None:
            for message in retained(connection, item.pattern, dict(item.where), self._clock, None):
                copy_retained(connection, self._clock, message, cursor.lastrowid, item.ordered)

    def _refuse_second(self, connection: sqlite3.Connection, queue: str) -> None:
        other = connection.execute(
            "SELECT name FROM subscription WHERE ?1 IN (name, pattern) AND name <> pattern LIMIT 1", (queue,)
        ).fetchone()
        if other is not None:
            raise ConfigurationError(
                f"{queue!r} cannot be a queue: the subscription {other[0]!r} is on that topic, or has its name"
            )

    def _refuse_empty(self, connection: sqlite3.Connection) -> None:
        row = connection.execute(
            "SELECT name FROM topic WHERE queue = 1 AND name NOT IN (SELECT name FROM subscription) LIMIT 1"
        ).fetchone()
        if row is not None:
            # It would accept jobs and drop them.
            raise ConfigurationError(f"queue {row[0]!r} has no subscription; declare one of the same name with it")


_KNOWN = "SELECT name, pattern, filter, ordered, maximum FROM subscription"


def _columns(item: Subscription) -> tuple[str, str | None, int, int | None]:
    where = msgspec.json.encode(dict(sorted(item.where.items()))).decode() if item.where else None
    return item.pattern, where, int(item.ordered), item.limit
