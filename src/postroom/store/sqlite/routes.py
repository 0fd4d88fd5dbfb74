"""The topology in the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from postroom.broker.base import Subscription, Topic
from postroom.store.routing import Routes, encode


def refresh(connection: sqlite3.Connection, routes: Routes) -> None:
    """Read again if another process has declared something; in the open transaction."""
    (version,) = connection.execute("SELECT value FROM meta WHERE key = 'topology'").fetchone()
    if version != routes.version:
        queues = [name for (name,) in connection.execute("SELECT name FROM queue")]
        declared = connection.execute("SELECT declared FROM subscription ORDER BY name")
        routes.update(version, queues, [text for (text,) in declared])


def declare(connection: sqlite3.Connection, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    """Remember these, in the open transaction."""
    before = connection.total_changes
    connection.executemany(
        "INSERT INTO queue VALUES (?) ON CONFLICT DO NOTHING", [(topic.name,) for topic in topics if topic.queue]
    )
    connection.executemany(
        "INSERT INTO subscription VALUES (?1, ?2) ON CONFLICT DO UPDATE SET declared = ?2 WHERE declared != ?2",
        [(subscription.name, encode(subscription)) for subscription in subscriptions],
    )
    if connection.total_changes != before:
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")


def forget(connection: sqlite3.Connection, subscription: str) -> None:
    """The subscription was deleted."""
    connection.execute("DELETE FROM subscription WHERE name = ?", (subscription,))
    connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")
