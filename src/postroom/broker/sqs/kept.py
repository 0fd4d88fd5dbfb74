"""A subscription as the tags of its queue tell of it, and what may be declared beside what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import msgspec

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqs.address import DEAD, FIFO
from postroom.errors import ConfigurationError

_TAG_LIMIT = 256


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription, and where its messages are."""

    declared: Subscription
    queue: bool
    url: str
    dead_url: str

    @property
    def name(self) -> str:
        return self.declared.name


def kept_from(url: str, tags: Mapping[str, str]) -> Kept | None:
    """``None`` if the queue is not one of ours. Raises ``ConfigurationError`` if only some of its tags are left."""
    if "postroom-name" not in tags:
        return None
    try:
        declared = Subscription(
            name=tags["postroom-name"],
            pattern=_unquoted(tags["postroom-pattern"]),
            where=msgspec.json.decode(_unquoted(tags.get("postroom-where", "=7B=7D")), type=dict[str, str]),
            ordered=url.endswith(FIFO),
        )
        is_queue = tags["postroom-kind"] == "queue"
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"queue {url.rpartition('/')[2]}: its tags postroom-pattern, postroom-kind and postroom-where, which tell "
            f"what it is for, were changed or removed ({type(error).__name__}: {error}); restore them, or remove "
            "postroom-name, too, and declare the subscription under another name"
        ) from error
    dead_url = url.removesuffix(FIFO) + DEAD + (FIFO if declared.ordered else "")
    return Kept(declared=declared, queue=is_queue, url=url, dead_url=dead_url)


def check(known: Mapping[str, Kept], topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    """Raises ``ConfigurationError`` unless every queue has one subscription, its own, and stays what it is."""
    queues = {kept.name for kept in known.values() if kept.queue}
    for topic in topics:
        if topic.name in queues and not topic.queue:
            raise ConfigurationError(f"{topic.name!r} is a queue and cannot become a topic; use another name")
    queues |= {topic.name for topic in topics if topic.queue}
    named = {name: kept.declared for name, kept in known.items()} | {wanted.name: wanted for wanted in subscriptions}
    for subscription in named.values():
        if subscription.name != subscription.pattern and queues & {subscription.name, subscription.pattern}:
            queue = subscription.pattern if subscription.pattern in queues else subscription.name
            raise ConfigurationError(
                f"subscription {subscription.name!r} of {subscription.pattern!r}: {queue!r} is a queue, which has "
                "exactly one subscription, of its own name; publish to a topic to reach several"
            )
    for name in sorted(queues & named.keys()):
        if name in known and not known[name].queue:
            raise ConfigurationError(f"{name!r} is a subscription and cannot become a queue; use another name")
    for name in sorted(queues - named.keys()):
        raise ConfigurationError(f"queue {name!r} has no subscription; declare one of the same name with it")
    for wanted in subscriptions:
        tags_of(wanted, False)
        if wanted.name in known and wanted.ordered != known[wanted.name].declared.ordered:
            is_now, would_be = ("unordered", "ordered") if wanted.ordered else ("ordered", "unordered")
            raise ConfigurationError(
                f"{wanted.name!r} is {is_now} and cannot become {would_be}: a FIFO queue is another kind of queue; "
                "use another name, or unsubscribe it first"
            )


def tags_of(wanted: Subscription, is_queue: bool) -> dict[str, str]:
    tags = {
        "postroom-name": wanted.name,
        "postroom-kind": "queue" if is_queue else "subscription",
        "postroom-pattern": _quoted(wanted.pattern),
        "postroom-where": _quoted(json.dumps(dict(wanted.where), sort_keys=True)),
    }
    for name, value in tags.items():
        if len(value) > _TAG_LIMIT:
            field = name.removeprefix("postroom-")
            raise ConfigurationError(
                f"subscription {wanted.name!r}: {field} needs {len(value)} characters in a tag of its queue, which "
                f"takes {_TAG_LIMIT}"
            )
    return tags


def _quoted(text: str) -> str:
    """In the characters of a tag: letters, digits, spaces and ``_.:/=+-@``, of which ``=`` is the mark."""
    return re.sub(rb"[^A-Za-z0-9 _.:/+@-]", lambda found: b"=%02X" % found[0][0], text.encode()).decode()


def _unquoted(tag: str) -> str:
    return re.sub(rb"=([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()), tag.encode()).decode()
