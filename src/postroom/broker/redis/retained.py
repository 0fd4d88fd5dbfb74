"""What topics retain: one stream each, read oldest first across topics, a page at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from postroom.broker.base import Subscription, Topic
from postroom.broker.redis import records
from postroom.broker.redis.link import Link
from postroom.message import Message

_PAGE = 200

Entry = tuple[tuple[int, int], Message]


async def pages(
    link: Link, topics: Sequence[Topic], item: Subscription, since: float | None, now: float
) -> AsyncIterator[list[Message]]:
    """What was published since then and is wanted by the subscription."""
    starts = {topic.name: f"{int(max(now - topic.retention, since or 0.0, 0.0) * 1000)}" for topic in topics}
    while starts:
        found: list[Entry] = []
        upto: tuple[int, int] | None = None
        for name, start in list(starts.items()):
            page = await _read(link, name, start)
            found += page
            if len(page) < _PAGE:
                del starts[name]
            else:
                # What lies beyond the end of a full page may be older than what comes next in it.
                upto = page[-1][0] if upto is None else min(upto, page[-1][0])
        later = [entry for entry in found if upto is not None and entry[0] > upto]
        for _, message in later:
            starts.setdefault(message.topic, "")
        for name in starts:
            starts[name] = f"({upto[0]}-{upto[1]}" if upto is not None else starts[name]
        chosen = sorted((entry for entry in found if upto is None or entry[0] <= upto), key=lambda entry: entry[0])
        wanted = item.where.items()
        yield [
            message for _, message in chosen if all(message.headers.get(header) == value for header, value in wanted)
        ]


async def _read(link: Link, topic: str, start: str) -> list[Entry]:
    with link.using() as client:
        found = await client.xrange(link.key("log", records.escape(topic)), min=start, count=_PAGE)
    return [(_place(entry_id), _message(stored)) for entry_id, stored in found]


def _place(entry_id: bytes) -> tuple[int, int]:
    time, _, number = entry_id.partition(b"-")
    return int(time), int(number)


def _message(stored: dict[bytes, Any]) -> Message:
    return records.message(stored[b"id"].decode(), stored)
