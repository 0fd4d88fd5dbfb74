"""Messages of foreign producers: each topic and queue has a stream that anybody may ``XADD`` to.

Every process that consumes takes in what comes, as one consumer group. An entry is published under an id of its own,
confirmed, and only then removed; whoever dies in between leaves it to the others, and its id makes no second message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from postroom.broker.redis import records
from postroom.broker.redis.link import BLOCK, Link, end
from postroom.broker.redis.topology import Known, Topology
from postroom.errors import BrokerClosed, PostroomError
from postroom.message import MAX_PRIORITY, Message

logger = logging.getLogger("postroom.broker")

GROUP = "postroom"
_CONSUMER = "postroom"
"""The same for every process: who has taken an entry is told by its idle time, and names of the dead would pile up."""
_PAGE = 100
_ABANDONED = 5.0
"""Seconds after which an entry that somebody took, and did not remove, is anybody's."""
_PAUSE = 1.0
_PRIORITIES = {str(priority): priority for priority in range(MAX_PRIORITY + 1)}

Publish = Callable[[Sequence[Message]], Awaitable[list[str | PostroomError]]]
Entry = tuple[bytes, bytes, Message]
"""Stream, its id in there, and what it says."""


class Inlet:
    """Runs from ``start`` to ``close``."""

    def __init__(self, link: Link, topology: Topology, publish: Publish) -> None:
        self._link = link
        self._topology = topology
        self._publish = publish
        self._client: Any = None
        self._streams: dict[bytes, str] = {}
        """Topic by the name of its stream."""
        self._version = ""
        self._look_at = 0.0
        """When to look for what others left, by ``time.monotonic``."""
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Unless it runs."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._running is not None:
            await end(self._running)
        await self._disconnect()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _run(self) -> None:
        while True:
            try:
                if await self._ready():
                    await self._take_in()
            except BrokerClosed:
                return
            except PostroomError as error:
                # A group may have gone with a stream that somebody deleted, a master with a failover.
                self._version = ""
                await self._disconnect()
                logger.debug("cannot take in what others produce, trying again: %s", error)
                await asyncio.sleep(_PAUSE)

    async def _take_in(self) -> None:
        if time.monotonic() >= self._look_at:
            taken = await self._abandoned()
            if taken and await self._store(taken):
                # There may be more of them, and now there is room.
                return
            self._look_at = time.monotonic() + (_PAUSE if taken else _ABANDONED)
        await self._store(await self._fresh())

    async def _ready(self) -> bool:
        """Know the streams of all topics, and let each have the group."""
        known = await self._topology.read()
        if known.version != self._version:
            await self._prepare(known)
        if not self._streams:
            await asyncio.sleep(_PAUSE)
        return bool(self._streams)

    async def _prepare(self, known: Known) -> None:
        streams = {self._link.key("inlet", records.escape(name)).encode(): name for name in known.topics}
        with self._link.translated():
            if self._client is None:
                self._client = self._link.new_client(1)
            for stream in streams:
                try:
                    await self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
                except ResponseError as error:
                    if not str(error).startswith("BUSYGROUP"):
                        raise
        self._streams, self._version = streams, known.version

    async def _fresh(self) -> list[Entry]:
        """Wait for what comes."""
        wanted = dict.fromkeys(self._streams, ">")
        with self._link.translated():
            found = await self._client.xreadgroup(GROUP, _CONSUMER, wanted, count=_PAGE, block=int(BLOCK * 1000))
        return [entry for stream, entries in found or [] for entry in self._entries(stream, entries)]

    async def _abandoned(self) -> list[Entry]:
        taken: list[Entry] = []
        with self._link.using() as client, self._link.translated():
            for stream in self._streams:
                told = await client.xautoclaim(stream, GROUP, _CONSUMER, int(_ABANDONED * 1000), count=_PAGE)
                taken += self._entries(stream, told[1])
        return taken

    async def _store(self, entries: Sequence[Entry]) -> bool:
        """Whether all are stored. What is refused stays where it is, and is tried again."""
        if not entries:
            return True
        answers = await self._publish([message for _, _, message in entries])
        stored: dict[bytes, list[bytes]] = {}
        refused: dict[str, list[PostroomError]] = {}
        for (stream, entry_id, message), answer in zip(entries, answers, strict=True):
            if isinstance(answer, PostroomError):
                refused.setdefault(message.topic, []).append(answer)
            else:
                stored.setdefault(stream, []).append(entry_id)
        with self._link.using() as client:
            for stream, ids in stored.items():
                await client.xack(stream, GROUP, *ids)
                await client.xdel(stream, *ids)
        for topic, errors in refused.items():
            logger.warning("%d messages in the inlet of %s wait: %s", len(errors), topic, errors[0])
        return not refused

    def _entries(self, stream: bytes, entries: Sequence[Any]) -> list[Entry]:
        topic = self._streams[stream]
        return [(stream, entry_id, _message(topic, entry_id, stored)) for entry_id, stored in entries if stored]


def _message(topic: str, entry_id: bytes, stored: dict[bytes, bytes]) -> Message:
    """CloudEvents names: ``type``, ``data``, ``id``, ``partitionkey``; and ``priority``. All others are headers."""
    texts = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in stored.items()}
    texts.pop("data", None)
    priority = _PRIORITIES.get(texts.get("priority", ""))
    if priority is not None:
        del texts["priority"]
    return Message(
        # The server's own name of the entry, so that it keeps it however often it is taken in.
        id=texts.pop("id", "") or f"{topic}/{entry_id.decode()}",
        topic=topic,
        name=texts.pop("type", ""),
        body=stored.get(b"data", b""),
        key=texts.pop("partitionkey", None),
        priority=priority or 0,
        headers=texts,
        created_at=int(entry_id.partition(b"-")[0]) / 1000,
    )
