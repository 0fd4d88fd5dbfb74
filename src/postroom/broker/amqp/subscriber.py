"""One channel on which the server hands over messages of one queue, no more of them than are wanted.

A message that the server has handed over counts as tried if this process dies. So the server is asked for as many as
there is demand for, and what nobody takes is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from postroom.broker.amqp.link import Channel

_MOST_TAGS = 8
_SPARE = 16


class Subscriber:
    """Hands what arrives to ``arrived(tag, method, properties, body)``. Ends with its channel, of which it tells
    ``lost()``; then make another."""

    def __init__(
        self,
        channel: Channel,
        queue: str,
        arrived: Callable[[int, Any, Any, bytes], object],
        lost: Callable[[], object],
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._arrived = arrived
        self._windows: dict[str, int] = {}
        """By consumer tag, how many unsettled messages the server lets it have."""
        self._unsettled: dict[int, None] = {}
        self._next_barrier: asyncio.Task[Any] | None = None
        self._turn = asyncio.Lock()
        self.is_deleted = False
        """The queue was deleted."""
        channel.raw.add_on_cancel_callback(self._on_cancel)
        channel.when_closed(lambda _: lost())
        self._lost = lost

    @property
    def is_alive(self) -> bool:
        return self._channel.reason is None

    def ask(self, wanted: int) -> None:
        """Let up to ``wanted`` messages be unsettled."""
        window = sum(self._windows.values())
        if window > 2 * wanted + _SPARE or (wanted > window and len(self._windows) >= _MOST_TAGS):
            self.ask_nothing()
            window = 0
        if wanted > window:
            # Of a large window a half more: else it would grow in as many steps as demand does.
            more = max(wanted - window, window // 2 if window >= _SPARE else 0)
            self._channel.raw.basic_qos(prefetch_count=more)
            tag = self._channel.raw.basic_consume(self._queue, self._on_message)
            self._windows[tag] = more

    def ask_nothing(self) -> None:
        """Let the server hand over no more; what it has handed over stays here."""
        if self.is_alive and self._windows:
            self._channel.cancel(list(self._windows))
        self._windows.clear()

    def ack(self, tags: Sequence[int]) -> None:
        """Settle for good. Effective after ``barrier``."""
        for tag in tags:
            self._unsettled.pop(tag, None)
        lowest = next(iter(self._unsettled), None)
        below = [tag for tag in tags if lowest is None or tag < lowest]
        if below:
            # All up to it are settled: one frame for all of them.
            self._channel.raw.basic_ack(max(below), multiple=True)
        for tag in tags:
            if lowest is not None and tag > lowest:
                self._channel.raw.basic_ack(tag)

    def requeue(self, tag: int) -> None:
        """Give back as if this process had died with it."""
        self._unsettled.pop(tag, None)
        self._channel.raw.basic_nack(tag, requeue=True)

    async def barrier(self) -> None:
        """Return once the server has dealt with what was sent before. Raises ``BrokerUnavailable``.

        An ack has no answer, and one that was written to a lost connection has settled nothing. But the server works
        off a channel in order: an answer to a later question confirms the acks. Many settles share one question.
        """
        if self._next_barrier is None:
            self._next_barrier = asyncio.get_running_loop().create_task(self._ask_through())
        await asyncio.shield(self._next_barrier)

    async def close(self) -> None:
        await self._channel.close()

    async def _ask_through(self) -> None:
        async with self._turn:
            self._next_barrier = None
            await self._channel.call("flow", active=True)

    def _on_message(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        tag: int = method.delivery_tag
        self._unsettled[tag] = None
        self._arrived(tag, method, properties, body)

    def _on_cancel(self, _: Any) -> None:
        self._windows.clear()
        self.is_deleted = True
        self._lost()
