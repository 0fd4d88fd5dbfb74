"""The history of a topic that retains its messages: a stream, which is read without taking anything from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from postroom.broker.amqp import wire
from postroom.broker.amqp.confirms import Post, Publisher
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.link import Link, Refused
from postroom.errors import BrokerUnavailable

logger = logging.getLogger("postroom.broker.amqp")

_WINDOW = 500
_SILENCE = 10.0
_RECOVERY = 10.0
_PAUSE = 0.1


async def until_up(link: Link, streams: Iterable[str]) -> None:
    """A server that has started takes messages before it has its streams, and keeps them in none: wait for these.

    For some seconds at most; not for one that is gone.
    """
    deadline = asyncio.get_running_loop().time() + _RECOVERY
    for stream in streams:
        while not await _is_up(link, stream):
            if asyncio.get_running_loop().time() > deadline:
                raise BrokerUnavailable(f"the server has not recovered {stream!r}; try again")
            await asyncio.sleep(_PAUSE)


async def _is_up(link: Link, stream: str) -> bool:
    channel = await link.channel()
    try:
        await channel.call("queue_declare", queue=stream, passive=True)
    except Refused as error:
        # As RabbitMQ says it of a queue that it knows (rabbit_amqqueue, `not_found_or_absent`).
        return "inaccessible" not in error.told
    finally:
        await channel.close()
    return True


async def read(link: Link, publisher: Publisher, stream: str, topic: str, since: float) -> AsyncIterator[Copy]:
    """All that was published to ``topic`` since that unix time and up to now, oldest first.

    A server tells nobody where a stream ends; so we write a mark at its end, and read up to that.
    """
    mark = uuid4().hex
    (answer,) = await publisher.send([Post("", stream, wire.mark(mark), b"")])
    if answer != "stored":
        raise BrokerUnavailable(f"cannot read {stream!r}: {answer}")
    channel = await link.channel()
    arrived: asyncio.Queue[tuple[Any, Any, bytes] | None] = asyncio.Queue()
    channel.when_closed(lambda _: arrived.put_nowait(None))
    # A stream begins with the chunk in which the time lies, not with the message.
    offset = datetime.fromtimestamp(since, UTC) if since > 0 else "first"
    try:
        await channel.call("basic_qos", prefetch_count=_WINDOW)
        await channel.call(
            "basic_consume",
            queue=stream,
            on_message_callback=lambda _, *found: arrived.put_nowait(found),
            arguments={"x-stream-offset": offset},
        )
        while True:
            async with asyncio.timeout(_SILENCE):
                found = await arrived.get()
            if found is None:
                raise BrokerUnavailable(f"the connection was lost while reading {stream!r}")
            method, properties, body = found
            channel.ack(method.delivery_tag)
            if wire.is_mark(properties, body):
                if properties.message_id == mark:
                    return
                continue
            copy = wire.read(properties, body, lambda: topic)
            if copy.oversized:
                logger.warning("%s: message %s cannot be repeated: its headers are too large", topic, copy.message.id)
            elif copy.message.created_at >= since:
                yield copy
    except TimeoutError as error:
        raise BrokerUnavailable(f"{stream!r} was silent for {_SILENCE:.0f} s before its end") from error
    finally:
        await channel.close()
