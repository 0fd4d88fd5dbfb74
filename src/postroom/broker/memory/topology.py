"""What may be declared beside what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postroom.broker.base import Subscription, Topic
from postroom.errors import ConfigurationError


def check(
    known_topics: Mapping[str, Topic],
    known_subscriptions: Sequence[Subscription],
    topics: Sequence[Topic],
    subscriptions: Sequence[Subscription],
) -> None:
    """Raises ``ConfigurationError`` unless every queue has one subscription, its own, and stays a queue."""
    for topic in topics:
        known = known_topics.get(topic.name)
        if known is not None and known.queue != topic.queue:
            is_now, would_be = ("queue", "topic") if known.queue else ("topic", "queue")
            raise ConfigurationError(f"{topic.name!r} is a {is_now} and cannot become a {would_be}; use another name")
    all_topics = {**known_topics, **{topic.name: topic for topic in topics}}
    queues = {name for name, topic in all_topics.items() if topic.queue}
    named = {subscription.name: subscription for subscription in (*known_subscriptions, *subscriptions)}
    for subscription in named.values():
        if subscription.name != subscription.pattern and queues & {subscription.name, subscription.pattern}:
            queue = subscription.pattern if subscription.pattern in queues else subscription.name
            raise ConfigurationError(
                f"subscription {subscription.name!r} of {subscription.pattern!r}: {queue!r} is a queue, which has "
                "exactly one subscription, of its own name; publish to a topic to reach several"
            )
    for queue in sorted(queues - named.keys()):
        raise ConfigurationError(f"queue {queue!r} has no subscription; declare one of the same name with it")
