"""Which subscriptions get a message, as far as it was declared through a store."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from postroom.broker.base import Subscription
from postroom.broker.routing import wants
from postroom.message import Message

_subscription = msgspec.json.Decoder(Subscription)


class Routes:
    """The topology as of one version of it."""

    def __init__(self) -> None:
        self.version = -1
        self._queues: set[str] = set()
        self._subscriptions: list[Subscription] = []

    def update(self, version: int, queues: Iterable[str], declared: Iterable[str]) -> None:
        """``declared``: as ``encode`` wrote them."""
        self._queues = set(queues)
        self._subscriptions = [_subscription.decode(text) for text in declared]
        self.version = version

    def subscriptions(self, message: Message) -> list[str]:
        """Their names."""
        if message.topic in self._queues:
            return [message.topic]
        return [
            subscription.name
            for subscription in self._subscriptions
            if subscription.name not in self._queues and wants(subscription, message)
        ]


def encode(subscription: Subscription) -> str:
    """What routing needs of it, as JSON."""
    return msgspec.json.encode(
        {"name": subscription.name, "pattern": subscription.pattern, "where": dict(subscription.where)}
    ).decode()
