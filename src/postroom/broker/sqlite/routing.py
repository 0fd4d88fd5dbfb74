"""Which subscriptions a message goes to."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from postroom.message import NO_HEADERS


class Route(NamedTuple):
    """A subscription as publishing needs to know it."""

    id: int
    name: str
    where: Mapping[str, str]
    ordered: bool
    maximum: int | None

    def wants(self, headers: Mapping[str, str]) -> bool:
        return all(headers.get(name) == value for name, value in self.where.items())


class Destination(NamedTuple):
    """A topic with its subscriptions."""

    retention: float
    routes: tuple[Route, ...]
    plain: Route | None
    """The only route, if it takes everything, unordered and without a maximum, and nothing is retained."""


class Routes:
    """The topology as it stands in the file; read anew when the file says that it has changed."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._destinations: dict[str, Destination] = {}
        self._subscriptions: list[tuple[str, Route]] = []
        self._topics: dict[str, tuple[bool, float]] = {}

    def refresh(self, connection: sqlite3.Connection) -> None:
        """To be called at the start of every transaction that uses the routes."""
        (version,) = connection.execute("SELECT value FROM meta WHERE key = 'topology'").fetchone()
        if version == self._version:
            return
        self._topics = {
            name: (bool(queue), retention)
            for name, queue, retention in connection.execute("SELECT name, queue, retention FROM topic")
        }
        self._subscriptions = [
            (pattern, Route(number, name, msgspec.json.decode(where) if where else NO_HEADERS, bool(ordered), maximum))
            for number, name, pattern, where, ordered, maximum in connection.execute(
                "SELECT id, name, pattern, filter, ordered, maximum FROM subscription ORDER BY id"
            )
        ]
        self._destinations = {}
        self._version = version

    def forget(self) -> None:
        """What was read may have been rolled back."""
        self._version = None

    def destination(self, topic: str) -> Destination | None:
        """``None`` if the topic was never declared."""
        found = self._destinations.get(topic)
        if found is None and topic in self._topics:
            queue, retention = self._topics[topic]
            routes = tuple(
                route
                for pattern, route in self._subscriptions
                if (route.name == topic if queue else not self._is_queue(route.name) and matches(pattern, topic))
            )
            found = self._destinations[topic] = Destination(retention, routes, _plain(retention, routes))
        return found

    def _is_queue(self, name: str) -> bool:
        return name in self._topics and self._topics[name][0]


def _plain(retention: float, routes: tuple[Route, ...]) -> Route | None:
    if retention > 0 or len(routes) != 1:
        return None
    (route,) = routes
    return None if route.where or route.ordered or route.maximum is not None else route


def matches(pattern: str, topic: str) -> bool:
    """Whether the topic fits: ``*`` stands for one word, ``#`` for any number of words, none included."""
    if pattern == topic:
        return True
    return _matches(pattern.split("."), topic.split("."))


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])
