"""Declaring topics and subscriptions, and the routes that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.postgresql.link import Link
from postroom.broker.routing import matches
from postroom.errors import ConfigurationError

_LOCK = "SELECT pg_advisory_xact_lock(hashtext($1), 0)"
_TOPICS = "SELECT name, queue, retention FROM ~.topic"
_SUBSCRIPTIONS = "SELECT id, name, pattern, filter::text, ordered, maximum FROM ~.subscription"
_SET_TOPIC = """
INSERT INTO ~.topic VALUES ($1, $2, $3) ON CONFLICT (name) DO UPDATE SET queue = $2, retention = $3
"""
_ADD = "INSERT INTO ~.subscription (name, pattern, filter, ordered, maximum) VALUES ($1, $2, $3, $4, $5) RETURNING id"
_CHANGE = "UPDATE ~.subscription SET pattern = $2, filter = $3, ordered = $4, maximum = $5 WHERE name = $1"
_ROUTE = """
INSERT INTO ~.route (topic, sub, name, filter, ordered, maximum)
SELECT t.topic, s.id, s.name, s.filter, s.ordered, s.maximum
FROM unnest($1::text[], $2::integer[]) AS t(topic, sub) JOIN ~.subscription s ON s.id = t.sub
"""
_FREE_KEYS = "SELECT ~.free_keys(ARRAY(SELECT id FROM ~.dedup WHERE until = 'Infinity'))"
_STEP = 1000
"""Messages that one statement of a replay copies."""


class Known(NamedTuple):
    """The topology as it stands."""

    topics: dict[str, tuple[bool, float]]
    subscriptions: dict[str, tuple[int, str, str | None, bool, int | None]]
    """By name: id, pattern, filter, ordered, maximum."""

    def topics_of(self, name: str) -> list[str]:
        """The topics, queues aside, that a subscription is on."""
        pattern = self.subscriptions[name][1]
        return [topic for topic, (queue, _) in self.topics.items() if not queue and matches(pattern, topic)]


async def read(link: Link) -> Known:
    return _known(await link.fetch(_TOPICS), await link.fetch(_SUBSCRIPTIONS))


def changes(known: Known, topics: Iterable[Topic], subscriptions: Iterable[Subscription]) -> bool:
    """Whether anything differs from what is known: a declaration mostly does not."""
    return any(known.topics.get(topic.name) != (topic.queue, float(topic.retention)) for topic in topics) or any(
        item.name not in known.subscriptions or known.subscriptions[item.name][1:] != _columns(item)
        for item in subscriptions
    )


async def declare(
    link: Link, topics: Sequence[Topic], subscriptions: Sequence[Subscription], moment: float | None
) -> None:
    """Raises ``ConfigurationError`` if a queue would get a second subscription, or change its kind."""

    async def run(connection: Any) -> None:
        await connection.execute(_LOCK, link.address.schema)
        known = await _read_in(link, connection)
        _check(known, topics, subscriptions)
        if any(item.start == "earliest" and item.name not in known.subscriptions for item in subscriptions):
            # Whoever publishes meanwhile waits: what is not in the log yet will go by the new route.
            await connection.execute(link.statement("LOCK TABLE ~.log IN SHARE MODE"))
        for topic in topics:
            await connection.execute(link.statement(_SET_TOPIC), topic.name, topic.queue, float(topic.retention))
        for item in subscriptions:
            sql = _CHANGE if item.name in known.subscriptions else _ADD
            await connection.execute(link.statement(sql), item.name, *_columns(item))
        now_known = await _read_in(link, connection)
        await _draw_routes(link, connection, now_known)
        for item in subscriptions:
            if item.start == "earliest" and item.name not in known.subscriptions:
                await replay(link, connection, now_known, item.name, 0.0, moment)

    await link.transact(run)


async def unsubscribe(link: Link, name: str, sub: int) -> None:
    """Delete a subscription and all it holds; a queue with it, which would accept jobs and drop them."""

    async def run(connection: Any) -> None:
        await connection.execute(_LOCK, link.address.schema)
        await connection.execute(link.statement("SELECT ~.turn($1)"), sub)
        for table, column in (("route", "sub"), ("subscription", "id"), ("message", "sub"), ("record", "sub")):
            await connection.execute(link.statement(f"DELETE FROM ~.{table} WHERE {column} = $1"), sub)
        await connection.execute(link.statement("DELETE FROM ~.topic WHERE name = $1 AND queue"), name)
        await connection.execute(link.statement(_FREE_KEYS))

    await link.transact(run)


async def replay(link: Link, connection: Any, known: Known, name: str, since: float, moment: float | None) -> int:
    """Retained messages once more, to one subscription; within the transaction of the caller. Returns how many."""
    total, place = 0, 0
    topics = known.topics_of(name)
    sql = link.statement("SELECT count, last FROM ~.replay($1, $2, $3, $4, $5, $6)")
    while True:
        count, last = await connection.fetchrow(sql, known.subscriptions[name][0], topics, since, place, _STEP, moment)
        total += int(count)
        if last is None:
            return total
        place = last


def _known(topics: Iterable[Any], subscriptions: Iterable[Any]) -> Known:
    return Known(
        {name: (queue, retention) for name, queue, retention in topics},
        {name: (sub, *columns) for sub, name, *columns in subscriptions},
    )


async def _read_in(link: Link, connection: Any) -> Known:
    return _known(
        await connection.fetch(link.statement(_TOPICS)), await connection.fetch(link.statement(_SUBSCRIPTIONS))
    )


async def _draw_routes(link: Link, connection: Any, known: Known) -> None:
    """Anew for all: a topic may match old patterns, a pattern old topics."""
    queues = {topic for topic, (queue, _) in known.topics.items() if queue}
    pairs = [
        (topic, sub)
        for topic in known.topics
        for name, (sub, pattern, *_) in known.subscriptions.items()
        if (name == topic if topic in queues else name not in queues and matches(pattern, topic))
    ]
    await connection.execute(link.statement("DELETE FROM ~.route"))
    await connection.execute(link.statement(_ROUTE), [pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _check(known: Known, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    queues = {name for name, (queue, _) in known.topics.items() if queue}
    for topic in topics:
        before = known.topics.get(topic.name)
        if before is not None and before[0] != topic.queue:
            kind = "queue" if before[0] else "topic"
            raise ConfigurationError(f"{topic.name!r} is a {kind} on this broker already; choose another name")
    queues |= {topic.name for topic in topics if topic.queue}
    patterns = {name: columns[1] for name, columns in known.subscriptions.items()}
    patterns |= {item.name: item.pattern for item in subscriptions}
    for name, pattern in patterns.items():
        queue = next((queue for queue in (pattern, name) if queue in queues), None)
        if queue is not None and name != pattern:
            raise ConfigurationError(
                f"{queue!r} is a queue: it has one subscription only, named like it, so {name!r} of {pattern!r} "
                "cannot be one"
            )
    for queue in queues:
        if queue not in patterns:
            # It would accept jobs and drop them.
            raise ConfigurationError(f"queue {queue!r} has no subscription; declare one of the same name with it")


def _columns(item: Subscription) -> tuple[str, str | None, bool, int | None]:
    where = msgspec.json.encode(dict(sorted(item.where.items()))).decode() if item.where else None
    return item.pattern, where, item.ordered, item.limit
