"""Which subscriptions want a message."""

from __future__ import annotations

from functools import lru_cache

from postroom.broker.base import Subscription
from postroom.message import Message


@lru_cache(maxsize=10_000)
def matches(pattern: str, topic: str) -> bool:
    """Whether ``pattern`` fits: words split at dots, ``*`` is one word, ``#`` any number, also none."""
    wanted = pattern.split(".")
    # All places in the pattern that the words read so far can have led to: linear even with many ``#``.
    places = _with_skipped(wanted, {0})
    for word in topic.split("."):
        fitting = {place for place in places if place < len(wanted) and wanted[place] in ("#", "*", word)}
        places = _with_skipped(wanted, {place if wanted[place] == "#" else place + 1 for place in fitting})
    return len(wanted) in places


def _with_skipped(wanted: list[str], places: set[int]) -> set[int]:
    """Each place, and where one gets from it by taking a ``#`` for no word."""
    reached = set(places)
    for place in places:
        while place < len(wanted) and wanted[place] == "#":
            place += 1
            reached.add(place)
    return reached


def wants(subscription: Subscription, message: Message) -> bool:
    """Whether topic and headers of ``message`` are what ``subscription`` asks for."""
    where = subscription.where
    # Most ask for no header, and this runs for each message.
    return matches(subscription.pattern, message.topic) and (
        not where or all(message.headers.get(name) == value for name, value in where.items())
    )
