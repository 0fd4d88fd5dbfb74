"""The dead letters of one subscription. Each method has an ``a`` twin for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from postroom.broker.base import Broker
from postroom.broker.thread import BrokerThread
from postroom.errors import ConfigurationError, JobNotFound
from postroom.message import DeadLetter
from postroom.store.blobs import BlobStore

PAGE = 100
"""Letters that are read, redriven or discarded in one step."""

Where = Callable[[DeadLetter], bool]


class DeadLetters:
    """Made by ``app.dead_letters(name)``. They are kept until somebody redrives or discards them."""

    def __init__(self, thread: BrokerThread, blobs: BlobStore, subscription: str) -> None:
        self._thread = thread
        self._blobs = blobs
        self._subscription = subscription

    def list(self, *, after: str | None = None, limit: int = PAGE) -> list[DeadLetter]:
        """Oldest first, beginning behind the id ``after``. Raises ``SubscriptionNotFound``."""
        return self._thread.call(lambda broker: broker.dead_letters(self._subscription, after=after, limit=limit))

    async def alist(self, *, after: str | None = None, limit: int = PAGE) -> Sequence[DeadLetter]:
        """See :meth:`list`."""
        return await self._thread.acall(
            lambda broker: broker.dead_letters(self._subscription, after=after, limit=limit)
        )

    def get(self, job_id: str) -> DeadLetter:
        """One letter with its whole history. Raises ``JobNotFound`` if it is not among the dead ones."""
        return self._thread.call(lambda broker: self._get(broker, job_id))

    async def aget(self, job_id: str) -> DeadLetter:
        """See :meth:`get`."""
        return await self._thread.acall(lambda broker: self._get(broker, job_id))

    def redrive(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        where: Where | None = None,
        rate: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Put letters back into their subscription, attempts counted from 1, history kept. Returns how many.

        ``ids``: these; ``where``: those for which it is true; neither: all that are dead now (one that dies again
        meanwhile is not redriven twice). ``rate``: at most so many a second. ``progress`` is called with the
        number moved so far. Dying half-way leaves each letter either dead or redriven.
        """
        return self._thread.call(lambda broker: self._redrive(broker, ids, where, rate, progress))

    async def aredrive(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        where: Where | None = None,
        rate: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """See :meth:`redrive`."""
        return await self._thread.acall(lambda broker: self._redrive(broker, ids, where, rate, progress))

    def discard(self, ids: str | Iterable[str] | None = None, *, where: Where | None = None) -> int:
        """Delete letters for good, with the files that belong to them. Returns how many.

        Raises ``ConfigurationError`` if neither ``ids`` nor ``where`` says which.
        """
        return self._thread.call(lambda broker: self._discard(broker, ids, where))

    async def adiscard(self, ids: str | Iterable[str] | None = None, *, where: Where | None = None) -> int:
        """See :meth:`discard`."""
        return await self._thread.acall(lambda broker: self._discard(broker, ids, where))

    async def _get(self, broker: Broker, job_id: str) -> DeadLetter:
        found = await broker.dead_letters(self._subscription, ids=[job_id])
        if not found:
            raise JobNotFound(
                f"{self._subscription} has no dead letter {job_id}; it may have been redriven or discarded"
            )
        return found[0]

    async def _redrive(
        self,
        broker: Broker,
        ids: str | Iterable[str] | None,
        where: Where | None,
        rate: float | None,
        progress: Callable[[int], None] | None,
    ) -> int:
        if rate is not None and not rate > 0:
            raise ConfigurationError(f"redrive(rate={rate!r}): messages a second, more than 0")
        chosen = await self._choose(broker, ids, where)
        step = PAGE if rate is None else max(1, min(PAGE, int(rate / 10)))
        begin = asyncio.get_running_loop().time()
        moved = 0
        for start in range(0, len(chosen), step):
            if rate is not None:
                await asyncio.sleep(max(0.0, begin + start / rate - asyncio.get_running_loop().time()))
            moved += len(await broker.redrive(self._subscription, chosen[start : start + step]))
            if progress is not None:
                progress(moved)
        return moved

    async def _discard(self, broker: Broker, ids: str | Iterable[str] | None, where: Where | None) -> int:
        if ids is None and where is None:
            raise ConfigurationError(
                "discard(): name the letters by ids or where=; for all of them, where=lambda letter: True"
            )
        chosen = await self._choose(broker, ids, where)
        gone = 0
        for start in range(0, len(chosen), PAGE):
            discarded = await broker.discard(self._subscription, chosen[start : start + PAGE])
            gone += len(discarded)
            # The files go last: a letter must never point at nothing.
            await asyncio.to_thread(self._remove_files, discarded)
        return gone

    def _remove_files(self, ids: Iterable[str]) -> None:
        for job_id in ids:
            self._blobs.remove(job_id)

    async def _choose(self, broker: Broker, ids: str | Iterable[str] | None, where: Where | None) -> Sequence[str]:
        """The ids in question, as they are dead now."""
        wanted = None if ids is None else [ids] if isinstance(ids, str) else [*ids]
        return [letter.message.id async for letter in self._all(broker, wanted) if where is None or where(letter)]

    async def _all(self, broker: Broker, ids: Sequence[str] | None) -> AsyncIterator[DeadLetter]:
        if ids is not None:
            for start in range(0, len(ids), PAGE):
                for letter in await broker.dead_letters(self._subscription, ids=ids[start : start + PAGE]):
                    yield letter
            return
        after: str | None = None
        while page := await broker.dead_letters(self._subscription, after=after, limit=PAGE):
            for letter in page:
                yield letter
            after = page[-1].message.id
