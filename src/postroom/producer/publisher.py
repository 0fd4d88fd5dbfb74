"""From many callers to few confirmed batches: publishes that wait together share one round trip."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from postroom.broker.base import Broker
from postroom.broker.demands import serves_all, unmet
from postroom.broker.thread import BrokerThread
from postroom.errors import MessageTooLarge, PostroomError, PublishFailed
from postroom.message import Message

MAX_BATCH = 1000
"""Messages sent to the broker in one go, so that a burst of callers makes no endless transaction."""

Answers = list[str | PostroomError]


class _Request:
    """Messages of one caller, and where their answers go: a thread's future or an event loop's."""

    __slots__ = ("future", "loop", "messages")

    def __init__(
        self,
        messages: Sequence[Message],
        future: Future[Any] | asyncio.Future[Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.messages = messages
        self.future = future
        self.loop = loop

    def resolve(self, answers: Answers | BaseException) -> None:
        future = self.future
        # The caller may have been cancelled or timed out meanwhile; its messages are published all the same.
        if isinstance(future, asyncio.Future):
            if future.done():
                return
        elif not future.set_running_or_notify_cancel():
            return
        if isinstance(answers, BaseException):
            future.set_exception(answers)
        else:
            future.set_result(answers)


class Publisher:
    """Collects the publishes of all threads and event loops of a process; one batch is under way at a time."""

    def __init__(self, thread: BrokerThread, *, max_message_size: int) -> None:
        self._thread = thread
        self._max_message_size = max_message_size
        self._waiting: deque[_Request] = deque()
        self._mutex = threading.Lock()
        self._scheduled = False

    def publish(self, messages: Sequence[Message]) -> Answers:
        """Publish and wait. Answers in order; see ``Broker.publish``. Raises if nothing is known of any."""
        return self.submit(messages).result()

    def submit(self, messages: Sequence[Message]) -> Future[Answers]:
        """Publish without waiting; raises ``MessageTooLarge`` at once."""
        self.check(messages)
        future: Future[Answers] = Future()
        self._add(_Request(messages, future, None))
        return future

    async def apublish(self, messages: Sequence[Message]) -> Answers:
        """``publish`` for event loops. If cancelled, the messages may be published or not."""
        self.check(messages)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answers] = loop.create_future()
        self._add(_Request(messages, future, loop))
        return await future

    def check(self, messages: Sequence[Message]) -> None:
        """Raise ``MessageTooLarge`` for the first one above the limit."""
        for message in messages:
            if len(message.body) > self._max_message_size:
                raise MessageTooLarge(
                    f"{message.name}: the message body has {len(message.body):,} bytes, the limit is "
                    f"{self._max_message_size:,}; pass an Upload or a reference, or raise max_message_size"
                )

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> Answers:
        """Publish inside the open transaction of the caller's own database connection."""
        self.check(messages)
        return self._thread.call(_itself).publish_in(connection, messages)

    async def apublish_in(self, connection: Any, messages: Sequence[Message]) -> Answers:
        """``publish_in`` for a connection that may be asynchronous, on the event loop of the caller."""
        self.check(messages)
        return await (await self._thread.acall(_itself)).apublish_in(connection, messages)

    def _add(self, request: _Request) -> None:
        loop = self._thread.loop
        self._waiting.append(request)
        with self._mutex:
            if self._scheduled:
                return
            self._scheduled = True
        loop.call_soon_threadsafe(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._send_all())

    async def _send_all(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                with self._mutex:
                    # Checked again under the lock: a request added since then saw ``_scheduled`` set.
                    if not self._waiting:
                        self._scheduled = False
                        return
                continue
            await self._send(batch)

    def _take(self) -> list[_Request]:
        batch: list[_Request] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0].messages) <= MAX_BATCH):
            batch.append(self._waiting.popleft())
            size += len(batch[-1].messages)
        return batch

    async def _send(self, batch: list[_Request]) -> None:
        messages = [message for request in batch for message in request.messages]
        results: list[Answers | BaseException]
        try:
            answers = await _publish(await self._thread.broker(), messages)
        except Exception as error:
            # Each caller gets an exception of its own: a shared one would collect all their tracebacks.
            results = [_unknown(error, request.messages) for request in batch]
        else:
            results, start = [], 0
            for request in batch:
                results.append(answers[start : start + len(request.messages)])
                start += len(request.messages)
        _deliver(batch, results)


async def _publish(broker: Broker, messages: Sequence[Message]) -> Answers:
    """Publish those of which the broker can do what they ask for; the others are refused."""
    if serves_all(broker.capabilities):
        return await broker.publish(messages)
    now = time.time()
    refusals = [unmet(broker.capabilities, message, now) for message in messages]
    told = iter(await broker.publish([m for m, refusal in zip(messages, refusals, strict=True) if refusal is None]))
    return [refusal or next(told) for refusal in refusals]


def _deliver(batch: list[_Request], results: list[Answers | BaseException]) -> None:
    """Answer every caller; one wake-up for each event loop, however many of its callers wait."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Request, Answers | BaseException]]] = {}
    for request, result in zip(batch, results, strict=True):
        if request.loop is None:
            request.resolve(result)
        else:
            by_loop.setdefault(request.loop, []).append((request, result))
    for loop, resolved in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve_all, resolved)
        except RuntimeError:
            # That event loop was closed while its messages were on the way: nobody is left to be told.
            if not loop.is_closed():
                raise


def _resolve_all(resolved: list[tuple[_Request, Answers | BaseException]]) -> None:
    for request, result in resolved:
        request.resolve(result)


def _unknown(error: Exception, messages: Sequence[Message]) -> BaseException:
    if not isinstance(error, PostroomError):
        return error
    failure = type(error)(*error.args)
    failure.__cause__ = error.__cause__ or error
    if isinstance(failure, PublishFailed):
        failure.unconfirmed = [message.id for message in messages]
    return failure


async def _itself(broker: Broker) -> Broker:
    return broker
