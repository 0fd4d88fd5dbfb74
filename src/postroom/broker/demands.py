"""What is asked of a broker, held against what it can do: nothing unsupported is ignored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from postroom.broker.base import PRIORITIES, Capabilities, Subscription, Topic
from postroom.errors import UnsupportedOperation
from postroom.handler import Handler
from postroom.message import Message, Unique

_STORE = "; App(store=…) or POSTROOM_STORE adds them, or choose a broker that can"
_ANOTHER = "; leave it out, or choose a broker that can"


def serves_all(capabilities: Capabilities) -> bool:
    """Whether no message can ask for too much."""
    return (
        capabilities.deduplication
        and capabilities.unique
        and capabilities.expiry
        and capabilities.priorities >= PRIORITIES
        and capabilities.delay is None
        and capabilities.max_message_size is None
    )


def unmet(capabilities: Capabilities, message: Message, now: float) -> UnsupportedOperation | None:
    """Why the broker cannot do what ``message`` asks for; ``None`` if it can. ``now``: unix time."""
    if message.idempotency_key is not None and not capabilities.deduplication:
        return _no_keys()
    if message.unique is not None and not capabilities.unique:
        return _no_unique(message.unique)
    if message.priority and message.priority not in capabilities.priorities:
        return _no_priority(capabilities, message.priority)
    if message.expires_at is not None and not capabilities.expiry:
        return UnsupportedOperation(f"expires: with this broker no message expires{_ANOTHER}", "expiry")
    if message.not_before is not None and capabilities.delay is not None:
        delay = message.not_before - now
        if delay > capabilities.delay:
            return UnsupportedOperation(
                f"a delay of {delay:,.0f} s: this broker can delay by {capabilities.delay:,.0f} s{_ANOTHER}", "delay"
            )
    return None


def check_tasks(capabilities: Capabilities, tasks: Iterable[Handler]) -> None:
    """Raises ``UnsupportedOperation`` for the first task whose every job would be refused."""
    for task in tasks:
        priority, unique = task.options.priority, task.options.unique
        refusal = None
        if priority and priority not in capabilities.priorities:
            refusal = _no_priority(capabilities, priority)
        elif unique in get_args(Unique) and not capabilities.unique:
            refusal = _no_unique(unique)
        elif unique is not None and not capabilities.deduplication:
            refusal = _no_keys()
        if refusal is not None:
            raise UnsupportedOperation(f"task {task.name!r}: {refusal}", refusal.capability)


def check_topology(capabilities: Capabilities, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
    """Raises ``UnsupportedOperation`` for the first thing the broker cannot do."""
    queues = {topic.name for topic in topics if topic.queue}
    for topic in topics:
        if topic.retention and not capabilities.retention:
            raise UnsupportedOperation(f"topic {topic.name!r}: this broker retains nothing{_ANOTHER}", "retention")
    for subscription in subscriptions:
        kind = "queue" if subscription.name in queues else "subscription"
        asked = {
            "ordering": subscription.ordered,
            "patterns": any(word in "*#" for word in subscription.pattern.split(".")),
            "filters": bool(subscription.where),
            "retention": subscription.start == "earliest",
            "limits": subscription.limit is not None,
        }
        for capability, wanted in asked.items():
            if wanted and not getattr(capabilities, capability):
                raise UnsupportedOperation(
                    f"{kind} {subscription.name!r}: this broker lacks {_NAMES[capability]}{_ANOTHER}", capability
                )


_NAMES = {
    "ordering": "order by key (ordered=True)",
    "patterns": "subscriptions by pattern",
    "filters": "filters by header (where=)",
    "retention": 'retained messages (start="earliest")',
    "limits": "limits of queues (queue_limit=)",
}


def _no_priority(capabilities: Capabilities, priority: int) -> UnsupportedOperation:
    wanted = ",".join(map(str, sorted({*capabilities.priorities, priority})))
    return UnsupportedOperation(
        f"priority={priority}: this broker does not keep it apart; add ?priorities={wanted} to its URL, and each queue "
        "has one more beside it for each of these, or leave it out",
        "priorities",
    )


def _no_unique(unique: object) -> UnsupportedOperation:
    return UnsupportedOperation(f"unique={unique!r}: this broker knows no unique jobs{_STORE}", "unique")


def _no_keys() -> UnsupportedOperation:
    return UnsupportedOperation(f"this broker knows no idempotency keys{_STORE}", "deduplication")
