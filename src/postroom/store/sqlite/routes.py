"""Which subscriptions get a message, as far as it was declared through this store."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.routing import wants
from postroom.message import Message

_subscription = msgspec.json.Decoder(Subscription)


class Routes:
    """Read again whenever another process has declared something."""

    def __init__(self) -> None:
        self._version = -1
        self._queues: set[str] = set()
        self._subscriptions: list[Subscription] = []

    def subscriptions(self, connection: sqlite3.Connection, message: Message) -> list[str]:
        """Their names; in the open transaction."""
        (version,) = connection.execute("SELECT value FROM meta WHERE key = 'topology'").fetchone()
        if version != self._version:
            self._queues = {name for (name,) in connection.execute("SELECT name FROM queue")}
            rows = connection.execute("SELECT declared FROM subscription ORDER BY name")
            self._subscriptions = [_subscription.decode(declared) for (declared,) in rows]
            self._version = version
        if message.topic in self._queues:
            return [message.topic]
        return [
            subscription.name
            for subscription in self._subscriptions
            if subscription.name not in self._queues and wants(subscription, message)
        ]


def declare(connection: sqlite3.Connection, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    """Remember these, in the open transaction."""
    before = connection.total_changes
    connection.executemany(
        "INSERT INTO queue VALUES (?) ON CONFLICT DO NOTHING", [(topic.name,) for topic in topics if topic.queue]
    )
    connection.executemany(
        "INSERT INTO subscription VALUES (?1, ?2) ON CONFLICT DO UPDATE SET declared = ?2 WHERE declared != ?2",
        [(subscription.name, _encode(subscription)) for subscription in subscriptions],
    )
    if connection.total_changes != before:
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")


def forget(connection: sqlite3.Connection, subscription: str) -> None:
    """The subscription was deleted."""
    connection.execute("DELETE FROM subscription WHERE name = ?", (subscription,))
    connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'topology'")


def _encode(subscription: Subscription) -> bytes:
    """What routing needs of it."""
    return msgspec.json.encode(
        {"name": subscription.name, "pattern": subscription.pattern, "where": dict(subscription.where)}
    )
