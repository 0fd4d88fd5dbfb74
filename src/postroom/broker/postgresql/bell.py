"""Hints that something may have become ready, by LISTEN and NOTIFY. Nothing depends on them: consumers look anyhow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import asyncpg

from postroom.broker.postgresql.link import Link
from postroom.errors import PostroomError

logger = logging.getLogger("postroom.broker")

TOGETHER = 0.005
"""Seconds for which hints are collected. Of many processes that notify, one at a time can commit: a transaction of
its own that waits for no disk, and that few need, keeps the publishes out of that line."""
_SIGN_OF_LIFE = 20.0
"""Seconds between questions whether the connection that only listens is still there."""
_PAUSES = (0.1, 0.5, 1.0, 2.0, 5.0)

Subs = frozenset[int]
ALL: Subs = frozenset()
"""Hints for every subscription."""


class Bell:
    """Rung by whoever has changed something; ``heard(subs)`` is called when others have."""

    def __init__(self, link: Link, heard: Callable[[Subs], None]) -> None:
        self._link = link
        self._heard = heard
        self._channel = link.address.schema
        self._rung: set[int] = set()
        self._ringing: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self.listens = False
        """Whether hints of others arrive now."""

    def ring(self, subs: Iterable[int]) -> None:
        """Tell others, soon; those of this process are told by the caller."""
        self._rung.update(subs)
        if self._rung and self._ringing is None and not self._link.closed:
            self._ringing = asyncio.get_running_loop().create_task(self._ring())

    def listen(self) -> None:
        """From now on, through breaks of the connection. A pooler has no connection that could listen."""
        if self._listening is None and not self._link.address.pgbouncer:
            self._listening = asyncio.get_running_loop().create_task(self._keep_listening())

    async def close(self) -> None:
        tasks = [task for task in (self._ringing, self._listening) if task is not None]
        if self._listening is not None:
            self._listening.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._listening = None

    async def _ring(self) -> None:
        await asyncio.sleep(TOGETHER)
        subs, self._rung, self._ringing = self._rung, set(), None
        with suppress(PostroomError):
            # Whoever waits looks by himself before long.
            await self._link.fetch("SELECT pg_notify($1, $2)", self._channel, ",".join(map(str, sorted(subs))))

    async def _keep_listening(self) -> None:
        failed = 0
        while True:
            try:
                connection = await asyncpg.connect(**self._link.arguments())
                try:
                    await connection.add_listener(self._channel, self._notified)
                    self.listens, failed = True, 0
                    # While nobody listened something may have come.
                    self._heard(ALL)
                    while True:
                        await asyncio.sleep(_SIGN_OF_LIFE)
                        await connection.execute("SELECT 1")
                finally:
                    self.listens = False
                    connection.terminate()
            except (
                OSError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
                TimeoutError,
            ) as error:
                pause = _PAUSES[min(failed, len(_PAUSES) - 1)]
                logger.info("not listening to %s now, looking instead: %s", self._link.address.shown, error)
                failed += 1
                await asyncio.sleep(pause)

    def _notified(self, connection: Any, process: int, channel: str, payload: object) -> None:
        self._heard(frozenset(int(sub) for sub in str(payload).split(",") if sub.isdecimal()))
