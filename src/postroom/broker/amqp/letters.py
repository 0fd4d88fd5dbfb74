"""Dead letters: a queue beside each subscription's own, of which nothing is taken but by an operator."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import Any

import msgspec

from postroom.broker.amqp import wire
from postroom.broker.amqp.address import Address
from postroom.broker.amqp.confirms import Post, Publisher
from postroom.broker.amqp.link import Channel, Link, Refused
from postroom.broker.amqp.wire import Copy
from postroom.clock import Clock
from postroom.errors import BrokerUnavailable
from postroom.message import DeadLetter

_ACCESS_REFUSED = 403
_OTHERS = 20.0
"""Seconds to wait while somebody else looks through the same queue."""
_PAUSE = 0.05
_SILENCE = 2.0
"""Seconds without a message after which the rest is taken for gone."""


class Letters:
    """Looks through the whole queue, alone: taken messages are in nobody else's sight, so two would miss some."""

    def __init__(self, link: Link, publisher: Publisher, address: Address, clock: Clock) -> None:
        self._link = link
        self._publisher = publisher
        self._address = address
        self._clock = clock

    async def page(
        self, subscription: str, ids: Sequence[str] | None, after: str | None, limit: int
    ) -> list[DeadLetter]:
        """Oldest first; bodies are kept of one page at a time."""
        wanted = None if ids is None else frozenset(ids)
        page: list[tuple[tuple[float, str], DeadLetter]] = []
        start = None if after is None else await self._place_of(subscription, after)
        async with _Look(self._link, self._address.dead(subscription)) as look:
            async for _, copy in look:
                place = _place(copy)
                if (start is not None and place <= start) or (wanted is not None and copy.message.id not in wanted):
                    continue
                page.append((place, copy.letter(subscription)))
                if len(page) > 2 * limit + 100:
                    page = heapq.nsmallest(limit, page, key=lambda entry: entry[0])
        return [letter for _, letter in heapq.nsmallest(limit, page, key=lambda entry: entry[0])]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        queue, now = self._address.queue(subscription), self._clock.now()

        async def move(copy: Copy) -> bool:
            post = Post("", queue, wire.properties_of(copy.revived(now)), copy.message.body)
            (answer,) = await self._publisher.send([post])
            return answer == "stored"

        return await self._take(subscription, ids, move)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        async def forget(_: Copy) -> bool:
            return True

        return await self._take(subscription, ids, forget)

    async def _place_of(self, subscription: str, message_id: str) -> tuple[float, str] | None:
        """Where the letter of that id stands; ``None``: it is not there."""
        async with _Look(self._link, self._address.dead(subscription)) as look:
            async for _, copy in look:
                if copy.message.id == message_id:
                    return _place(copy)
        return None

    async def _take(self, subscription: str, ids: Sequence[str], let_go: Any) -> list[str]:
        """Remove those of ``ids`` for which ``let_go(copy)`` says that they may go. Returns which."""
        wanted, taken = set(ids), []
        async with _Look(self._link, self._address.dead(subscription)) as look:
            async for tag, copy in look:
                # The same id twice: a move that was interrupted between its two steps, or a second delivery.
                if copy.message.id in wanted and copy.message.id not in taken and await let_go(copy):
                    look.remove(tag)
                    taken.append(copy.message.id)
                    if len(taken) == len(wanted):
                        break
            await look.done()
        return [message_id for message_id in dict.fromkeys(ids) if message_id in taken]


class _Look:
    """All of a queue, message by message, each with its tag. What was not removed is back at the end."""

    def __init__(self, link: Link, queue: str) -> None:
        self._link = link
        self._queue = queue
        self._arrived: asyncio.Queue[tuple[int, Copy] | None] = asyncio.Queue()
        self._left = 0

    async def __aenter__(self) -> _Look:
        for _ in range(int(_OTHERS / _PAUSE)):
            self._channel = await self._link.channel()
            try:
                await self._begin(self._channel)
                return self
            except Refused as error:
                if error.code != _ACCESS_REFUSED:
                    raise BrokerUnavailable(str(error)) from error
            await asyncio.sleep(_PAUSE)
        raise BrokerUnavailable(f"for {_OTHERS:.0f} s others have been looking through {self._queue!r}; try again")

    async def __aexit__(self, *_: object) -> None:
        # Everything unsettled goes back with the channel.
        await self._channel.close()

    def __aiter__(self) -> _Look:
        return self

    async def __anext__(self) -> tuple[int, Copy]:
        if self._left <= 0:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(_SILENCE):
                found = await self._arrived.get()
        except TimeoutError:
            raise StopAsyncIteration from None
        if found is None:
            raise BrokerUnavailable(f"the connection was lost while looking through {self._queue!r}")
        self._left -= 1
        return found

    def remove(self, tag: int) -> None:
        self._channel.raw.basic_ack(tag)

    async def done(self) -> None:
        """Return once the server has removed what was to be removed."""
        await self._channel.call("flow", active=True)

    async def _begin(self, channel: Channel) -> None:
        channel.when_closed(lambda _: self._arrived.put_nowait(None))
        declared = await channel.call("queue_declare", queue=self._queue, passive=True)
        self._left = int(declared.method.message_count)
        if self._left:
            # To the end of it: what is unsettled is not handed over twice.
            await channel.call("basic_qos", prefetch_count=min(65_535, self._left))
        await channel.call("basic_consume", queue=self._queue, exclusive=True, on_message_callback=self._on_message)

    def _on_message(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        copy = wire.read(properties, body, self._queue)
        if copy.dead_at is None:
            copy = msgspec.structs.replace(copy, dead_at=wire.died_at(properties) or copy.message.created_at)
        self._arrived.put_nowait((method.delivery_tag, copy))


def _place(copy: Copy) -> tuple[float, str]:
    return (copy.dead_at or 0.0, copy.message.id)
