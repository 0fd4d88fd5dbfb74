"""What an app is made of: its queues, topics, subscriptions and the handlers bound to them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from postroom.broker.base import Capabilities, Subscription, Topic
from postroom.errors import ConfigurationError
from postroom.handler import EventHandler, Handler, TaskHandler

RETENTION = 86_400.0
"""Seconds for which a topic's events are kept unless the app says otherwise."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
_PATTERN = re.compile(r"(?:[A-Za-z0-9_-]+|\*|#)(?:\.(?:[A-Za-z0-9_-]+|\*|#))*")


class Topology:
    """The registry of one app. Names are checked as they come in."""

    def __init__(self, queue_limit: int | None) -> None:
        self._queue_limit = queue_limit
        self.tasks: dict[str, TaskHandler] = {}
        self.events: dict[str, EventHandler] = {}
        """By subscription."""
        self._topics: dict[str, Topic] = {}
        self._retained_by_default: set[str] = set()
        self._subscriptions: dict[str, Subscription] = {}

    def topics_on(self, capabilities: Capabilities) -> list[Topic]:
        """As they are to be declared: what nobody asked to be retained is not, where the broker retains nothing."""
        if capabilities.retention:
            return list(self._topics.values())
        return [
            Topic(name=topic.name, queue=topic.queue) if topic.name in self._retained_by_default else topic
            for topic in self._topics.values()
        ]

    @property
    def subscriptions(self) -> list[Subscription]:
        return list(self._subscriptions.values())

    def add_task(self, handler: TaskHandler) -> None:
        """Raises ``ConfigurationError`` if the name is taken or the queue is a topic."""
        known = self.tasks.get(handler.name)
        if known is not None:
            raise ConfigurationError(
                f"two tasks are named {handler.name!r}: {known.label} and {handler.label}; give one a name="
            )
        queue = check_name(handler.subscription, "queue")
        if queue in self._topics and not self._topics[queue].queue:
            raise ConfigurationError(f"task {handler.name!r}: {queue!r} is a topic, so it cannot be a queue too")
        if queue in self.events:
            raise ConfigurationError(f"task {handler.name!r}: {queue!r} is a subscription, so it cannot be a queue too")
        self.tasks[check_name(handler.name, "task")] = handler
        ordered = handler.options.ordered or (queue in self._subscriptions and self._subscriptions[queue].ordered)
        self._topics[queue] = Topic(name=queue, queue=True)
        self._subscriptions[queue] = Subscription(name=queue, pattern=queue, ordered=ordered, limit=self._queue_limit)

    def add_topic(self, name: str, retention: float | None) -> None:
        """Raises ``ConfigurationError`` if the name is a queue's or was declared before."""
        if name in self._topics:
            kind = "queue" if self._topics[name].queue else "topic"
            raise ConfigurationError(f"topic {name!r}: there is a {kind} of that name already")
        if retention is None:
            self._retained_by_default.add(name)
        self._topics[check_name(name, "topic")] = Topic(
            name=name, retention=RETENTION if retention is None else retention
        )

    def add_subscription(self, subscription: Subscription, handler: EventHandler) -> None:
        """Raises ``ConfigurationError`` if the name is taken or the pattern is malformed."""
        name = check_name(subscription.name, "subscription")
        if name in self._subscriptions:
            raise ConfigurationError(f"two subscriptions are named {name!r}; each needs a name of its own")
        if not _PATTERN.fullmatch(subscription.pattern):
            raise ConfigurationError(
                f"subscription {name!r}: the pattern {subscription.pattern!r} must be words with dots between, where "
                "* stands for one word and # for any number"
            )
        named = self._topics.get(subscription.pattern)
        if named is not None and named.queue:
            raise ConfigurationError(
                f"subscription {name!r}: {named.name!r} is a queue, and a queue has no other subscriptions"
            )
        self.events[name] = handler
        self._subscriptions[name] = Subscription(
            name=name,
            pattern=subscription.pattern,
            where=subscription.where,
            start=subscription.start,
            ordered=subscription.ordered,
            limit=self._queue_limit,
        )

    def handler(self, subscription: str, name: str) -> Handler | None:
        """Who handles a message of this name in this subscription; ``None`` if this app does not know it."""
        return self.events.get(subscription) or self.tasks.get(name)

    def handlers(self, subscription: str) -> list[Handler]:
        """All handlers of a subscription: one for an event's, perhaps several for a queue."""
        if subscription in self.events:
            return [self.events[subscription]]
        return [handler for handler in self.tasks.values() if handler.subscription == subscription]

    def select(self, names: Iterable[str] | None) -> list[str]:
        """The named subscriptions, or all. Raises ``ConfigurationError`` with a suggestion for an unknown one."""
        if names is None:
            return list(self._subscriptions)
        return [known(name, self._subscriptions, "queue or subscription") for name in names]


def check_name(name: str, what: str) -> str:
    """``name`` itself. Raises ``ConfigurationError`` if no broker would take it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {name!r}: 1 to 127 letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return name


def known(name: str, names: Iterable[str], what: str) -> str:
    """``name`` itself if it is among ``names``. Raises ``ConfigurationError`` that suggests the nearest."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(names)) or 'none'}"
    raise ConfigurationError(f"no {what} {name!r}; {hint}")
