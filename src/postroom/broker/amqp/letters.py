"""Dead letters: a queue beside each subscription's own, of which nothing is taken but by an operator."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any
from uuid import uuid4

from postroom.broker.amqp import wire
from postroom.broker.amqp.address import Address
from postroom.broker.amqp.confirms import Post, Publisher
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.link import ACCESS_REFUSED, CALL_PATIENCE, Link, Refused
from postroom.clock import Clock
from postroom.errors import BrokerUnavailable
from postroom.message import DeadLetter

_OTHERS = 20.0
"""Seconds to wait while somebody else looks through the same queue."""
_PAUSE = 0.05
_BATCH = 50
"""Letters moved at once: so many may be there twice if the process dies meanwhile."""
_SILENCE = 5.0
_MOST = 65_535
_Place = tuple[float, str]
"""Time of death, and id."""
_NOWHERE: _Place = (float("-inf"), "")
_Twins = tuple[str, bytes]
"""What two letters of one message have in common."""
_LetGo = Callable[[Sequence[Copy]], Awaitable[list[bool]]]


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
        """Oldest first, one of each message; bodies are kept of one page at a time."""
        wanted = None if ids is None else frozenset(ids)
        page: dict[object, tuple[_Place, DeadLetter]] = {}
        listed, last = (frozenset(), _NOWHERE) if after is None else await self._up_to(subscription, after)
        async with _Look(self._link, self._publisher, self._address, subscription) as look:
            async for tag, copy in look:
                place, twins = _place(copy), _twins(copy)
                if wanted is not None and copy.message.id not in wanted:
                    continue
                if place <= last if twins is None else twins in listed:
                    continue
                key = twins or tag
                if key not in page or place < page[key][0]:
                    page[key] = (place, copy.letter(subscription))
                if len(page) > 2 * limit + 100:
                    page = dict(heapq.nsmallest(limit, page.items(), key=lambda entry: entry[1][0]))
        return [letter for _, letter in heapq.nsmallest(limit, page.values(), key=lambda entry: entry[0])]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        queue, now = self._address.queue(subscription), self._clock.now()

        async def move(copies: Sequence[Copy]) -> list[bool]:
            posts = [
                Post("", queue, wire.properties_of(copy.revived(now)), copy.message.body)
                for copy in copies
                if not copy.oversized
            ]
            answers = iter(await self._publisher.send(posts))
            return [not copy.oversized and next(answers) == "stored" for copy in copies]

        return await self._take(subscription, ids, move)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        async def forget(copies: Sequence[Copy]) -> list[bool]:
            return [True] * len(copies)

        return await self._take(subscription, ids, forget)

    async def _up_to(self, subscription: str, last: str) -> tuple[frozenset[_Twins], _Place]:
        """Which are listed with the letters up to that of the id ``last``, and its place; none if it is not there."""
        places: dict[_Twins, _Place] = {}
        end = _NOWHERE
        async with _Look(self._link, self._publisher, self._address, subscription) as look:
            async for _, copy in look:
                place, twins = _place(copy), _twins(copy)
                if twins is not None:
                    # By its first letter, if a message has two: else a list that goes on behind it would begin anew.
                    place = places[twins] = min(place, places.get(twins, place))
                if copy.message.id == last:
                    end = max(end, place)
        return frozenset(each for each, place in places.items() if place <= end), end

    async def _take(self, subscription: str, ids: Sequence[str], let_go: _LetGo) -> list[str]:
        """Remove those of ``ids`` for which ``let_go(copies)`` says that they may go. Returns which."""
        wanted = set(ids)
        taken: dict[str, _Twins | None] = {}
        chosen: dict[str, tuple[int, Copy]] = {}
        others: list[tuple[int, Copy]] = []
        async with _Look(self._link, self._publisher, self._address, subscription) as look:

            async def take() -> None:
                for (tag, copy), gone in zip(
                    chosen.values(), await let_go([c for _, c in chosen.values()]), strict=True
                ):
                    if gone:
                        look.remove(tag)
                        taken[copy.message.id] = _twins(copy)
                chosen.clear()

            async for tag, copy in look:
                message_id = copy.message.id
                if message_id not in wanted:
                    continue
                if message_id in taken or message_id in chosen:
                    others.append((tag, copy))
                else:
                    chosen[message_id] = tag, copy
                if len(chosen) == _BATCH:
                    await take()
            await take()
            for tag, copy in others:
                # A second letter of one message: a crash has left it, between the two steps of a move or a retry.
                if (twins := _twins(copy)) is not None and twins == taken.get(copy.message.id):
                    look.remove(tag)
            await look.done()
        return [message_id for message_id in dict.fromkeys(ids) if message_id in taken]


class _Look:
    """All of a queue, message by message, each with its tag. What was not removed is back at the end.

    No server tells where a queue ends, and its count lags behind what was just put back. So we put a mark at the end,
    and look up to that.
    """

    def __init__(self, link: Link, publisher: Publisher, address: Address, subscription: str) -> None:
        self._link = link
        self._publisher = publisher
        self._queue = address.dead(subscription)
        self._topic = subscription
        self._mark = uuid4().hex
        self._marks: list[int] = []
        """Tags of this one and of those that a death has left."""
        self._at_end = False
        self._held = 0
        self._arrived: asyncio.Queue[tuple[Any, Any, bytes] | None] = asyncio.Queue()

    async def __aenter__(self) -> _Look:
        for _ in range(int(_OTHERS / _PAUSE)):
            self._channel = await self._link.channel()
            try:
                await self._begin()
                return self
            except Refused as error:
                if error.code != ACCESS_REFUSED:
                    raise
            except BaseException:
                await self._channel.close()
                raise
            await asyncio.sleep(_PAUSE)
        raise BrokerUnavailable(f"for {_OTHERS:.0f} s others have been looking through {self._queue!r}; try again")

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                # Not to leave the mark behind.
                async for _ in self:
                    pass
                for tag in self._marks:
                    self.remove(tag)
        finally:
            # Everything unsettled goes back with the channel.
            await self._channel.close()

    def __aiter__(self) -> _Look:
        return self

    async def __anext__(self) -> tuple[int, Copy]:
        while not self._at_end:
            try:
                async with asyncio.timeout(_SILENCE if self._held >= _MOST else CALL_PATIENCE):
                    found = await self._arrived.get()
            except TimeoutError:
                if self._held < _MOST:
                    # All that was seen so far must not be taken for all there is.
                    raise BrokerUnavailable(f"RabbitMQ is silent in the midst of {self._queue!r}") from None
                # There are more than the server hands over to one: these are the oldest.
                self._at_end = True
                raise StopAsyncIteration from None
            if found is None:
                raise BrokerUnavailable(f"the connection was lost while looking through {self._queue!r}")
            self._held += 1
            method, properties, body = found
            if not wire.is_mark(properties, body):
                return method.delivery_tag, wire.read_dead(properties, body, lambda: self._topic)
            self._marks.append(method.delivery_tag)
            self._at_end = properties.message_id == self._mark
        raise StopAsyncIteration

    def remove(self, tag: int) -> None:
        """Raises ``BrokerUnavailable``."""
        self._channel.ack(tag)
        self._held -= 1

    async def done(self) -> None:
        """Return once the server has removed what was to be removed."""
        await self._channel.call("flow", active=True)

    async def _begin(self) -> None:
        self._channel.when_closed(lambda _: self._arrived.put_nowait(None))
        # What is unsettled is not handed over twice; so all of it must fit.
        await self._channel.call("basic_qos", prefetch_count=_MOST)
        await self._channel.call(
            "basic_consume",
            queue=self._queue,
            exclusive=True,
            on_message_callback=lambda _, *found: self._arrived.put_nowait(found),
        )
        (answer,) = await self._publisher.send([Post("", self._queue, wire.mark(self._mark), b"")])
        if answer != "stored":
            raise BrokerUnavailable(f"cannot look through {self._queue!r}: {answer}")


def _place(copy: Copy) -> _Place:
    return (copy.dead_at or 0.0, copy.message.id)


def _twins(copy: Copy) -> _Twins | None:
    """``None``: it has none. Other clients may give one id to many messages, or none to any; each is its own."""
    return None if copy.nameless else (copy.message.id, sha256(copy.message.body).digest())
