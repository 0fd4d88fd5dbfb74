"""Messages on their way in: routed here, stored by one script a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from postroom.broker.base import Subscription
from postroom.broker.redis import records
from postroom.broker.redis.link import Link
from postroom.broker.redis.topology import Known, Topology
from postroom.errors import IdempotencyConflict, PostroomError, QueueFull, TopicNotFound
from postroom.message import Message

BATCH = 250
"""Messages for one script, or letters: the server does nothing else meanwhile."""
_BATCH_COPIES = 1000
_BATCH_BYTES = 4 << 20
"""Of all copies. One message goes whole, into however many subscriptions."""

Answer = str | PostroomError


async def publish(link: Link, topology: Topology, messages: Sequence[Message]) -> list[Answer]:
    """Returns the id or the error of each. Raises ``BrokerUnavailable`` if nothing is known of any."""
    known = await topology.known()
    if any(message.topic not in known.topics for message in messages):
        # Another process may have declared it meanwhile.
        known = await topology.read()
    answers: list[Answer] = []
    for batch in _batches(known, messages):
        try:
            answers += await topology.using(lambda known, batch=batch: _store(link, known, batch))  # type: ignore[misc]
        except PostroomError as error:
            if not answers:
                raise
            # What went before is stored, and must be told.
            answers += [error] * len(batch)
    return answers


async def replay(link: Link, item: Subscription, messages: Sequence[Message], *, again: bool) -> int:
    """Give retained messages to one subscription. ``again``: also those that it has ended already."""
    rows: list[Any] = []
    for message in messages:
        key = "" if message.key is None else f"={message.key}"
        expires = "" if message.expires_at is None else repr(message.expires_at)
        stored = records.fields(message)
        rows += (message.id, message.priority, expires, key, len(stored), *stored)
    flags = (int(item.ordered), int(again))
    count: int = await link.run("replay", records.escape(item.name), *flags, len(messages), *rows)
    return count


def _batches(known: Known, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    start = copies = size = 0
    for at, message in enumerate(messages):
        # A topic nobody has declared is refused later.
        more = max(1, len(known.wanting(message))) if message.topic in known.topics else 1
        copies, size = copies + more, size + more * len(message.body)
        if at > start and (at - start == BATCH or copies > _BATCH_COPIES or size > _BATCH_BYTES):
            yield messages[start:at]
            start, copies, size = at, more, more * len(message.body)
    if start < len(messages):
        yield messages[start:]


async def _store(link: Link, known: Known, messages: Sequence[Message]) -> list[Answer]:
    answers: list[Answer | None] = []
    targets: dict[str, int] = {}
    rows: list[Any] = []
    count = 0
    for message in messages:
        topic = known.topics.get(message.topic)
        if topic is None:
            answers.append(TopicNotFound(f"no queue or topic {message.topic!r}; declare it first"))
            continue
        wanted = " ".join([str(targets.setdefault(item.name, len(targets) + 1)) for item in known.wanting(message)])
        rows += _row(message, wanted, topic.retention)
        answers.append(None)
        count += 1
    if count:
        declared: list[Any] = [len(targets)]
        for name in targets:
            item = known.subscriptions[name]
            declared += (records.escape(name), int(item.ordered), "" if item.limit is None else item.limit)
        told = iter(await link.run("publish", *declared, count, *rows, version=known.version))
        answers = [_answer(next(told).decode(), message) if answer is None else answer
                   for answer, message in zip(answers, messages, strict=True)]  # fmt: skip
    return [answer for answer in answers if answer is not None]


def _row(message: Message, wanted: str, retention: float) -> tuple[Any, ...]:
    stored = records.fields(message)
    once, payload, window = "", "", ""
    if message.idempotency_key is not None:
        once, window = message.idempotency_key, repr(message.dedup_window)
        payload = hashlib.sha256(message.name.encode() + b"\0" + message.body).hexdigest()
    return (
        message.id,
        records.escape(message.topic),
        wanted,
        message.priority,
        "" if message.not_before is None else repr(message.not_before),
        "" if message.expires_at is None else repr(message.expires_at),
        repr(message.result_ttl),
        repr(retention),
        # No key is another thing than an empty one.
        "" if message.key is None else f"={message.key}",
        once,
        payload,
        window,
        message.unique or "",
        int(message.replace),
        len(stored),
        *stored,
    )


def _answer(told: str, message: Message) -> Answer:
    if told.startswith("="):
        return told[1:]
    what, _, detail = told.partition(" ")
    if what == "FULL":
        return QueueFull(f"{detail}: as many messages wait as its limit allows; try again later")
    return IdempotencyConflict(
        f"idempotency key {message.idempotency_key!r} was used in {message.topic!r} for another call "
        f"(message {detail}); use a new key, or the same name and arguments"
    )
