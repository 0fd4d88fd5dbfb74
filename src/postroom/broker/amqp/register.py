"""What all processes must know, kept on the server: one message in a queue of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from pika import BasicProperties  # type: ignore[import-untyped]

from postroom.broker.amqp.confirms import Post, Publisher
from postroom.broker.amqp.link import NOT_FOUND, Channel, Link, Refused
from postroom.errors import BrokerUnavailable

_PAUSE = 0.02

_PERSISTENT = 2


class Register:
    """Everybody may read it; whoever replaces it sees to it that nobody else does so at the same time."""

    def __init__(self, link: Link, publisher: Publisher, queue: str) -> None:
        self._link = link
        self._publisher = publisher
        self._queue = queue
        self.version = 0

    async def read(self, patience: float) -> bytes | None:
        """What was written last. ``b""``: there is no such queue, so nothing ever was.

        ``None``: it was empty for ``patience`` seconds, because somebody is reading its message and does not give it
        back, or because who wanted to write the first one died after making the queue.
        """
        channel = await self._link.channel()
        try:
            return await self._patiently(channel, patience)
        except Refused as error:
            if error.code == NOT_FOUND:
                return b""
            raise
        finally:
            # What was taken to be read goes back with the channel.
            await channel.close()

    async def look(self) -> bytes:
        """``read`` for the only one who reads it: an empty queue is empty."""
        channel = await self._link.channel()
        try:
            return await self._newest(channel) or b""
        finally:
            await channel.close()

    async def write(self, version: int, body: bytes) -> None:
        """For the only one who writes, to a queue that keeps but one message."""
        properties = BasicProperties(delivery_mode=_PERSISTENT, headers={"version": version})
        await self._store(properties, body)

    async def replace(self, channel: Channel, before: bytes, body: bytes, patience: float) -> None:
        """Write ``body`` to the queue, which is there. A death on the way leaves both, and the newer is read.

        Raises ``BrokerUnavailable`` if ``channel`` is lost, as what it holds for the caller is then another's, and if
        what is there is not ``before``: whoever read that was shown an old version, or nothing, while another was
        looking at the newer one.
        """
        found = await self._patiently(channel, patience if before else 0.0)
        if (found or b"") != before:
            raise BrokerUnavailable(f"{self._queue!r} has changed since it was read; the same call may be repeated")
        properties = BasicProperties(
            content_type="application/json",
            delivery_mode=_PERSISTENT,
            headers={"version": self.version + 1},
        )
        await self._store(properties, body)
        channel.ack(0, multiple=True)
        await channel.call("flow", active=True)

    async def _store(self, properties: Any, body: bytes) -> None:
        (answer,) = await self._publisher.send([Post("", self._queue, properties, body)])
        if answer != "stored":
            raise BrokerUnavailable(f"{self._queue!r} was not written: {answer}")

    async def _patiently(self, channel: Channel, patience: float) -> bytes | None:
        """The newest, as soon as nobody else has it."""
        found = await self._newest(channel)
        for _ in range(int(patience / _PAUSE)):
            if found is not None:
                break
            await asyncio.sleep(_PAUSE)
            found = await self._newest(channel)
        return found

    async def _newest(self, channel: Channel) -> bytes | None:
        """Take all there are; the newest of them."""
        newest: bytes | None = None
        while (found := await channel.get(self._queue)) is not None:
            _, properties, body = found
            version = _version(properties)
            if newest is None or version >= self.version:
                newest, self.version = body, version
        return newest


def _version(properties: Any) -> int:
    version = (properties.headers or {}).get("version")
    # Whatever another client may have put there.
    return version if isinstance(version, int) else 0
