"""Being told that something may be ready: one token of a list wakes one consumer, the longest waiting."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from postroom.broker.redis.link import BLOCK, Link, end
from postroom.errors import PostroomError

logger = logging.getLogger("postroom.broker")


class Bell:
    """Listens on a connection of its own, and only after somebody waited here."""

    def __init__(self, link: Link, key: str) -> None:
        self._link = link
        self._key = key
        self._client: Any = None
        self._listening: asyncio.Task[None] | None = None
        self.rung = asyncio.Event()
        self.waiting = 0

    def listen(self) -> None:
        """Set ``rung`` at the next token."""
        if self._listening is None or self._listening.done():
            self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def close(self) -> None:
        if self._listening is not None:
            await end(self._listening)
        await self._disconnect()

    async def _listen(self) -> None:
        try:
            with self._link.translated():
                if self._client is None:
                    self._client = self._link.new_client(1)
                while not await self._client.blpop([self._key], timeout=BLOCK):
                    if not self.waiting:
                        return
                if self.waiting:
                    self.rung.set()
                else:
                    # It was meant for somebody who has time.
                    await self._client.rpush(self._key, 1)
        except PostroomError as error:
            # Whoever waits looks again by itself before long, and learns what is wrong.
            logger.debug("cannot wait on %s: %s", self._key, error)
            await self._disconnect()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
