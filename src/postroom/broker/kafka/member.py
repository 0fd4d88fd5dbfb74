"""A place in a consumer group, in a thread of its own: it takes part in rebalances and commits, but fetches nothing.

The client serialises all calls to one consumer: a commit would wait for a poll that waits for messages. So this one
never waits for messages, and ``fetcher`` does nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

from postroom.broker.kafka import bridge
from postroom.broker.kafka.faults import DENIED
from postroom.broker.kafka.options import Options
from postroom.broker.kafka.reader import Place

logger = logging.getLogger("postroom.broker")

T = TypeVar("T")

_BEAT = 0.05
"""Seconds between two looks at what the group wants."""
_ANSWER = 5.0
"""Seconds for which a rebalance waits for the event loop, beside those for what is in flight."""
UNREACHABLE = {KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION, KafkaError._TRANSPORT, KafkaError._RESOLVE}


class Listener(Protocol):
    """Who is told. Everything is called on the event loop."""

    async def assigned(self, committed: list[tuple[Place, int | None, str | None]]) -> None:
        """These partitions are ours now, and no others. With what the group has committed of each."""
        ...

    async def revoked(self) -> list[TopicPartition]:
        """The group shares out anew; until then none is ours for certain. Returns what is to be committed before."""
        ...

    def lost(self) -> None:
        """The group has given us up."""
        ...


class Member:
    """Subscribes to topics for a group, and tells its listener. Constructed on the event loop."""

    def __init__(self, options: Options, group: str, listener: Listener, frozen: float) -> None:
        """``frozen``: seconds without a sign of life of the event loop after which the partitions are given up."""
        self._loop = asyncio.get_running_loop()
        self._options = options
        self._listener = listener
        self._frozen = frozen
        self._ours = False
        self._leave = False
        self._wanted: list[str] = []
        self._subscribed: list[str] = []
        self._requests: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._stopping = False
        self._seen = time.monotonic()
        self._probe_at = 0.0
        self.trouble: KafkaError | None = None
        """Why the server cannot be reached; ``None`` while it can."""
        self._consumer = Consumer(self._settings(group))
        self._thread = threading.Thread(target=self._run, name=f"postroom-kafka-{group}", daemon=True)
        self._thread.start()

    def _settings(self, group: str) -> dict[str, Any]:
        session = int(self._options.session * 1000)
        return self._options.client | {
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # Per topic: every member gets its share of the busy one, which a sticky assignor does not promise.
            "partition.assignment.strategy": "range",
            "session.timeout.ms": session,
            "heartbeat.interval.ms": max(100, session // 12),
            "max.poll.interval.ms": max(300_000, session),
            "socket.timeout.ms": int(self._options.timeout * 1000),
            "reconnect.backoff.max.ms": 1000,
            "error_cb": self.failed,
            "log_level": 2,
        }

    # On the event loop

    def follow(self, topics: Sequence[str]) -> None:
        """Be a member for these topics."""
        wanted = sorted(topics)
        if wanted != self._wanted:
            self._wanted = wanted
            self._requests.put(None)

    def leave(self) -> None:
        """Give up all partitions, even if somebody wants topics again before the thread sees it."""
        self._wanted, self._leave = [], True
        self._requests.put(None)

    def alive(self) -> None:
        """The event loop turns."""
        self._seen = time.monotonic()

    async def commit(self, places: list[TopicPartition]) -> None:
        """Durable on return. Raises ``KafkaException``."""
        if self._stopping:
            raise KafkaException(KafkaError(KafkaError._ASSIGNMENT_LOST))
        done: Future[None] = Future()
        self._requests.put((lambda: self._commit(places), done))
        await asyncio.wrap_future(done)

    async def close(self) -> None:
        self._stopping = True
        self._requests.put(None)
        await self._loop.run_in_executor(None, self._thread.join)

    def failed(self, error: KafkaError) -> None:
        """On any thread: the client tells of an error."""
        if error.code() in UNREACHABLE | DENIED:
            self.trouble = error
        else:
            logger.warning("Kafka: %s", error.str())

    # In the thread

    def _run(self) -> None:
        # A loop that ended without closing its broker must not keep its partitions from others.
        while not self._stopping and not self._loop.is_closed():
            try:
                self._follow_wishes()
                told = self._consumer.poll(0)
                if told is not None and (error := told.error()) is not None:
                    self.failed(error)
                if self.trouble is not None and self.trouble.code() in UNREACHABLE:
                    self._probe()
            except KafkaException as error:
                self.failed(error.args[0])
            except Exception:
                logger.exception("Kafka: a defect; the membership goes on")  # Without it nothing would be settled.
            self._serve()
        self._stopping = True
        try:
            self._consumer.close()
        except KafkaException as error:
            self.failed(error.args[0])
        self._ours = False
        while not self._requests.empty():
            self._serve()

    def _serve(self) -> None:
        """Wait a beat for something to do, and do it."""
        try:
            joining = self._subscribed and not self._ours
            request = self._requests.get(timeout=_BEAT / 5 if joining else _BEAT)
        except Empty:
            return
        if request is not None:
            work, done = request
            if not done.set_running_or_notify_cancel():
                return
            try:
                work()
            except KafkaException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _commit(self, places: list[TopicPartition]) -> None:
        if not self._ours:
            # Without a membership the client would commit as nobody, and over somebody else's work.
            raise KafkaException(KafkaError(KafkaError._ASSIGNMENT_LOST))
        for place in self._consumer.commit(offsets=places, asynchronous=False):
            if place.error is not None:
                raise KafkaException(place.error)
        self.trouble = None

    def _follow_wishes(self) -> None:
        if time.monotonic() - self._seen > self._frozen:
            # What a frozen loop holds must run elsewhere; nothing is released, so that what killed it is found out.
            self._wanted = []
        if self._leave:
            self._leave, self._subscribed = False, []
            self._consumer.unsubscribe()
        if self._wanted != self._subscribed:
            self._subscribed = self._wanted
            if self._subscribed:
                self._consumer.subscribe(
                    self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
                )
            else:
                self._consumer.unsubscribe()

    def _probe(self) -> None:
        """Nobody tells that the server is back."""
        if time.monotonic() >= self._probe_at:
            self._probe_at = time.monotonic() + 1.0
            self._consumer.list_topics(self._subscribed[0] if self._subscribed else "", timeout=1.0)
            self.trouble = None

    def _on_assign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        consumer.assign([TopicPartition(place.topic, place.partition, OFFSET_END) for place in places])
        if places:
            consumer.pause(places)
        if self._stopping:
            return
        try:
            known = self._committed(consumer, places)
        except KafkaException as error:
            logger.warning("Kafka: a share of the group is given up again: %s", error.args[0].str())
            self._leave = True
            return
        self._ours, self.trouble = True, None
        if not self._ask(self._listener.assigned(known)):
            self._leave = True  # Stuck, or without what it needs: others are better off with them.

    def _committed(
        self, consumer: Consumer, places: list[TopicPartition]
    ) -> list[tuple[Place, int | None, str | None]]:
        found = consumer.committed(places, timeout=self._options.timeout) if places else []
        for place in found:
            if place.error is not None:
                raise KafkaException(place.error)
        return [
            ((place.topic, place.partition), place.offset if place.offset >= 0 else None, place.metadata)
            for place in found
        ]

    def _on_revoke(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        if not self._ours or time.monotonic() - self._seen > self._frozen:
            self._on_lost(consumer, places)
            return
        asked = self._ask(self._listener.revoked())
        if asked and asked[0]:
            try:
                self._commit(asked[0])
            except KafkaException as error:
                logger.warning("Kafka: could not release before a rebalance: %s", error.args[0].str())
        self._ours = False
        if not self._wanted:
            # Nobody here will be told that they are somebody else's.
            bridge.tell(self._loop, self._listener.lost)

    def _on_lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._ours = False
        bridge.tell(self._loop, self._listener.lost)

    def _ask(self, question: Coroutine[Any, Any, T]) -> tuple[T] | None:
        """Its answer by the event loop; ``None`` if there is none in time."""
        asked = bridge.ask(self._loop, question)
        if asked is None:
            return None
        asked.add_done_callback(lambda _: self._requests.put(None))
        deadline = time.monotonic() + _ANSWER + self._options.handover
        while not asked.done():
            if time.monotonic() > deadline or self._loop.is_closed():
                asked.cancel()
                return None
            self._serve()  # What ends before the partitions go must be committed before they go.
        error = asked.exception()
        if error is not None:
            logger.warning("Kafka: a rebalance has failed here: %s", error)
            return None
        return (asked.result(),)
