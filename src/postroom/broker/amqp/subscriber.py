"""One channel on which the server hands over messages of one queue, no more of them than are wanted.

A message that the server has handed over counts as tried if this process dies. So the server is asked for as many as
there is demand for, and what nobody takes is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from postroom.broker.amqp.frames import Arrived
from postroom.broker.amqp.link import Channel

_QUIET = 0.05
"""Seconds without anything, after which nothing is taken to be on its way; more while the server is slow to answer."""
_MOST_WAIT = 3.0
_SPARE = 16
_LARGEST_WINDOW = 65_535
"""``prefetch-count`` has 16 bits (AMQP 0-9-1, ``basic.qos``)."""
_SETTLING = 1.0
"""Seconds after the last growth before the windows may shrink."""


class Subscriber:
    """Hands over what arrives. Ends with its channel, of which it tells ``lost()``; then make another.

    Demand grows by one consumer more on the channel, each with a window of its own: how many messages it may have
    unsettled. It shrinks by ending them all. A message that is on its way to a consumer when that is ended would be
    given back by the server, and be counted; so they are ended only when their windows are full, or all is quiet.

    ``requeues``: what is given up is ready again in the same queue; else the server dead-letters it.
    """

    def __init__(
        self, channel: Channel, queue: str, arrived: Arrived, lost: Callable[[], object], *, requeues: bool = True
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._arrived = arrived
        self._lost = lost
        self._requeues = requeues
        self._loop = asyncio.get_running_loop()
        self._windows: dict[str, int] = {}
        """By consumer tag."""
        self._used: dict[str, int] = {}
        """How much of each window is taken."""
        self._unsettled: dict[int, str] = {}
        """Delivery tags in their order, and the consumer tag of each."""
        self._beginning: set[str] = set()
        """Consumer tags that the server has not confirmed. RabbitMQ 3.10 crashes if one is ended before."""
        self._wanted = 0
        self._stirred_at = 0.0
        self._asked_at = 0.0
        self._latency = 0.0
        """Seconds that the server's latest answers took."""
        self._next_barrier: asyncio.Task[Any] | None = None
        self._turn = asyncio.Lock()
        self.is_deleted = False
        """The queue was deleted."""
        self.has_given_up = False
        channel.take(self._on_message)
        channel.raw.add_on_cancel_callback(self._on_cancel)
        channel.when_closed(lambda _: lost())

    @property
    def is_alive(self) -> bool:
        return self._channel.reason is None and not self.is_deleted

    @property
    def reason(self) -> Exception | None:
        """Why it has ended."""
        return self._channel.reason

    @property
    def unsettled(self) -> int:
        return len(self._unsettled)

    def holds(self, tag: int) -> bool:
        """Whether the server waits for us to settle it."""
        return self.is_alive and tag in self._unsettled

    def ask(self, wanted: int) -> None:
        """Let at least ``wanted`` messages be unsettled."""
        self._wanted = wanted
        window = sum(self._windows.values()) + sum(used for tag, used in self._used.items() if tag not in self._windows)
        if wanted <= window:
            return
        # At least a quarter: else there would be as many consumers as steps in which the demand grows.
        more = min(max(wanted - window, window // 4), _LARGEST_WINDOW)
        self._channel.raw.basic_qos(prefetch_count=more)
        tag = self._channel.raw.basic_consume(self._queue, self._from_pika, callback=self._on_begun)
        self._windows[tag] = more
        self._used[tag] = 0
        self._beginning.add(tag)
        self._stirred_at = self._asked_at = self._loop.time()

    @property
    def is_asking(self) -> bool:
        """Whether the server may hand over anything."""
        return bool(self._windows)

    @property
    def asks_too_much(self) -> bool:
        """Whether the windows have been much larger than the demand for a while."""
        is_settled = self._loop.time() - self._asked_at > _SETTLING
        return is_settled and sum(self._windows.values()) > 1.5 * self._wanted + _SPARE

    @property
    def is_quiet(self) -> bool:
        """Whether nothing can be on its way."""
        if self._beginning:
            return False
        return self.is_full or self._loop.time() - self._stirred_at > _QUIET + 5 * self._latency

    @property
    def is_full(self) -> bool:
        """Whether the server may hand over nothing more: then nothing is on its way for certain."""
        return not self._beginning and all(self._used[tag] >= window for tag, window in self._windows.items())

    def ask_nothing(self) -> None:
        """Let the server hand over no more; what it has handed over stays here. To be called when it is quiet."""
        if self.is_alive:
            self._channel.cancel(list(self._windows))
        for tag in self._windows:
            if not self._used[tag]:
                del self._used[tag]
        self._windows.clear()

    async def silence(self) -> None:
        """Ask for nothing, and return once everything that was on its way has arrived."""
        deadline = self._loop.time() + _MOST_WAIT
        while not self.is_quiet and self._loop.time() < deadline:  # noqa: ASYNC110 -- nothing happens for a while
            await asyncio.sleep(_QUIET / 5)
        self.ask_nothing()
        await self.barrier()

    def ack(self, tags: Sequence[int]) -> None:
        """Settle for good. Effective after ``barrier``."""
        for tag in tags:
            self._free(tag)
        self._stirred_at = self._loop.time()
        lowest = next(iter(self._unsettled), None)
        below = [tag for tag in tags if lowest is None or tag < lowest]
        if below:
            # All up to it are settled: one frame for all of them.
            self._channel.raw.basic_ack(max(below), multiple=True)
        for tag in tags:
            if lowest is not None and tag > lowest:
                self._channel.raw.basic_ack(tag)

    def give_up(self, tag: int) -> None:
        """Give back as if this process had died with it."""
        self.has_given_up = True
        self._reject(tag, requeue=self._requeues)

    def bury(self, tag: int) -> None:
        """Let the server dead-letter it, as it is."""
        self._reject(tag, requeue=False)

    def _reject(self, tag: int, *, requeue: bool) -> None:
        self._free(tag)
        self._stirred_at = self._loop.time()
        self._channel.raw.basic_nack(tag, requeue=requeue)

    async def barrier(self) -> None:
        """Return once the server has dealt with what was sent before. Raises ``BrokerUnavailable``.

        An ack has no answer, and one that was written to a lost connection has settled nothing. But the server works
        off a channel in order: an answer to a later question confirms the acks. Many settles share one question.
        """
        if self._next_barrier is None:
            self._next_barrier = self._loop.create_task(self._ask_through())
        await asyncio.shield(self._next_barrier)

    async def close(self) -> None:
        await self._channel.close()

    async def _ask_through(self) -> None:
        async with self._turn:
            self._next_barrier = None
            begin = self._loop.time()
            await self._channel.call("flow", active=True)
            self._note_latency(begin)

    def _note_latency(self, begin: float) -> None:
        self._latency = max(self._loop.time() - begin, 0.8 * self._latency)

    def _free(self, tag: int) -> None:
        consumer = self._unsettled.pop(tag)
        self._used[consumer] -= 1
        if not self._used[consumer] and consumer not in self._windows:
            del self._used[consumer]

    def _on_begun(self, frame: Any) -> None:
        self._beginning.discard(frame.method.consumer_tag)
        self._note_latency(self._asked_at)

    def _from_pika(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        self._on_message(
            method.consumer_tag,
            method.delivery_tag,
            method.redelivered,
            method.exchange,
            method.routing_key,
            properties,
            body,
        )

    def _on_message(
        self, consumer: str, tag: int, is_again: bool, exchange: str, routing_key: str, properties: Any, body: bytes
    ) -> None:
        self._unsettled[tag] = consumer
        # A server that was slow sends more than a moment after it looked quiet: then the window was closed meanwhile.
        self._used[consumer] = self._used.get(consumer, 0) + 1
        self._stirred_at = self._loop.time()
        self._arrived(consumer, tag, is_again, exchange, routing_key, properties, body)

    def _on_cancel(self, _: Any) -> None:
        self._windows.clear()
        self.is_deleted = True
        self._lost()
