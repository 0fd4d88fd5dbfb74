"""Publishing that is done once the server has stored it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from pika import exceptions  # type: ignore[import-untyped]

from postroom.broker.amqp.link import Channel, Link, Refused, translated
from postroom.errors import BrokerUnavailable

CONFIRM_PATIENCE = 30.0
"""Seconds to wait for confirms; then their messages count as unknown."""

_TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")
_WINDOW = 1000
"""Messages written before others get their turn."""


class Post(NamedTuple):
    """What is to be published where."""

    exchange: str
    routing_key: str
    properties: Any
    body: bytes


Answer = Literal["stored", "unrouted", "refused", "unknown"]
"""``unrouted``: no queue is bound for it. ``refused``: a queue is full, or has no majority of its nodes.
``unknown``: the connection was lost before the server answered; perhaps it is stored."""


class _Batch:
    __slots__ = ("answers", "done", "left")

    def __init__(self, size: int) -> None:
        self.answers: list[Answer] = ["unknown"] * size
        self.left = size
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Publisher:
    """All publishing of one broker, on one channel in confirm mode (rabbitmq.com/docs/confirms)."""

    def __init__(self, link: Link, prepare: Callable[[], Awaitable[None]]) -> None:
        """``prepare`` is awaited before the first message of each connection."""
        self._link = link
        self._prepare = prepare
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._tag = 0
        self._waiting: dict[int, tuple[_Batch, int, Post]] = {}
        self._returned: dict[tuple[str, str, str], int] = {}
        self.largest: int | None = None
        """Bytes of body that the server takes, once it has refused more: it closes the channel for it."""

    @property
    def is_blocked(self) -> bool:
        """Whether the server has told that it takes nothing."""
        return self._link.is_blocked

    async def send(self, posts: Sequence[Post]) -> list[Answer]:
        """Publish, and wait for the answer to each. Raises ``BrokerUnavailable`` if nothing is known of any."""
        if not posts:
            return []
        channel = await self._opened()
        await self._link.unblocked()
        batch = _Batch(len(posts))
        for start in range(0, len(posts), _WINDOW):
            for index, post in enumerate(posts[start : start + _WINDOW], start):
                self._write(channel, batch, index, post)
            if len(posts) > _WINDOW:
                await asyncio.sleep(0)
        try:
            async with asyncio.timeout(CONFIRM_PATIENCE):
                await batch.done
        except TimeoutError:
            # The answers already there stand; the rest is unknown, and would be kept as long as the server is silent.
            for tag in [tag for tag, (owner, _, _) in self._waiting.items() if owner is batch]:
                del self._waiting[tag]
        if all(answer == "unknown" for answer in batch.answers):
            reason = None if channel.reason is None else translated(channel.reason, self._link.address)
            hint = "" if isinstance(reason, Refused) else "; the same call may be repeated"
            raise BrokerUnavailable(f"not confirmed: {reason or 'no answer'}{hint}") from reason
        return batch.answers

    def _write(self, channel: Channel, batch: _Batch, index: int, post: Post) -> None:
        if channel.reason is not None:
            batch.end()
            return
        try:
            channel.raw.basic_publish(post.exchange, post.routing_key, post.body, post.properties, mandatory=True)
        except exceptions.AMQPError as error:
            raise translated(error, self._link.address) from error
        self._tag += 1
        self._waiting[self._tag] = (batch, index, post)

    async def _opened(self) -> Channel:
        async with self._opening:
            if self._channel is None or self._channel.reason is not None:
                self._channel = await self._open()
            return self._channel

    async def _open(self) -> Channel:
        channel = await self._link.channel()
        channel.raw.add_on_return_callback(self._on_return)
        self._tag = 0
        waiting: dict[int, tuple[_Batch, int, Post]] = {}
        self._waiting = waiting
        self._returned = {}
        await channel.call("confirm_delivery", ack_nack_callback=self._on_confirm)
        channel.when_closed(lambda reason: self._lose(waiting, reason))
        try:
            await self._prepare()
        except BaseException:
            # The next call opens another one.
            await channel.close()
            raise
        return channel

    def _lose(self, waiting: dict[int, tuple[_Batch, int, Post]], reason: Exception) -> None:
        if too_large := _TOO_LARGE.search(str(reason)):
            self.largest = int(too_large[1])
        for batch, _, _ in waiting.values():
            batch.end()
        waiting.clear()

    def _on_return(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        # It comes before the confirm of the same message, but does not tell its number.
        identity = (method.exchange, method.routing_key, properties.message_id or "")
        self._returned[identity] = self._returned.get(identity, 0) + 1

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        stored = method.NAME == "Basic.Ack"
        if not method.multiple:
            self._tell(method.delivery_tag, stored)
            return
        for tag in list(takewhile(method.delivery_tag.__ge__, self._waiting)):
            self._tell(tag, stored)

    def _tell(self, tag: int, stored: bool) -> None:
        waiting = self._waiting.pop(tag, None)
        if waiting is None:
            return
        batch, index, post = waiting
        batch.tell(index, "refused" if not stored else "unrouted" if self._was_returned(post) else "stored")

    def _was_returned(self, post: Post) -> bool:
        if not self._returned:
            return False
        identity = (post.exchange, post.routing_key, post.properties.message_id or "")
        count = self._returned.pop(identity, 0)
        if count > 1:
            self._returned[identity] = count - 1
        return count > 0
