"""The memory broker itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from postroom.broker.base import (
    PRIORITIES,
    Broker,
    Capabilities,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.broker.memory.consumer import MemoryConsumer
from postroom.broker.memory.jobs import MemoryJobs
from postroom.broker.memory.state import State
from postroom.clock import Clock, SystemClock
from postroom.errors import BrokerClosed, ConfigurationError, PostroomError
from postroom.message import DeadLetter, Message
from postroom.store.base import JobStore

_SCHEME = "memory://"

_named: dict[str, State] = {}
_named_lock = threading.Lock()


class MemoryBroker(Broker):
    """Keeps everything in this process, and nothing after it. For tests, for trying out, and to be read.

    ``memory://`` is private to the broker object. ``memory://name`` is shared by all brokers of that name in the
    process, on any event loop and thread, and lives as long as the process.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durability="none",
        shared=False,
        # Nobody outlives the process; for a consumer that only hangs there is the lease, 30 s by default.
        death_notice=30.0,
        jobs=True,
        transactional_publish=False,
        delay=None,
        priorities=PRIORITIES,
        fifo=True,
        ordering=True,
        patterns=True,
        filters=True,
        deduplication=True,
        unique=True,
        known_ids=True,
        start_notes=True,
        expiry=True,
        limits=True,
        exact_stats=True,
        retention=True,
    )

    def __init__(self, url: str = _SCHEME, *, clock: Clock | None = None) -> None:
        """``clock``: for tests; brokers of one name use that of the first. Raises ``ConfigurationError``."""
        name = url.removeprefix(_SCHEME)
        if not url.startswith(_SCHEME) or any(mark in name for mark in "/?#"):
            raise ConfigurationError(f"broker URL {url!r}: write memory:// or memory://name, without options")
        self._name = name
        self._clock = clock or SystemClock()
        self._state: State | None = None
        self._closed = False
        self._consumers: set[MemoryConsumer] = set()

    async def connect(self) -> None:
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._state is None:
            self._state = _shared_state(self._name, self._clock) if self._name else State(self._clock)

    async def close(self) -> None:
        for consumer in list(self._consumers):
            await consumer.close()
        self._closed = True

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        with self._opened() as state:
            state.declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        with self._opened() as state:
            return [state.publish(message) for message in messages]

    async def consume(self, subscription: str, *, lease: float = 30.0) -> MemoryConsumer:
        if lease <= 0:
            raise ConfigurationError(f"consume: lease must be more than 0 seconds, not {lease}")
        with self._opened() as state:
            consumer = MemoryConsumer(state, state.subscription(subscription), lease, self._consumers.discard)
            self._consumers.add(consumer)
            return consumer

    async def stats(self) -> list[SubscriptionStats]:
        with self._opened() as state:
            return [
                state.subscriptions[name].stats(state.now, state.is_queue(name)) for name in sorted(state.subscriptions)
            ]

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        with self._opened() as state:
            kept = state.subscription(subscription)
            # One that was redriven meanwhile still has its place; one that is gone has none, and nothing is left out.
            last = kept.copies[after].death if after is not None and after in kept.copies else 0
            copies = [
                copy for copy in kept.dead.values() if copy.death > last and (ids is None or copy.message.id in ids)
            ]
            return [copy.letter() for copy in copies[:limit]]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        with self._opened() as state:
            return state.redrive(state.subscription(subscription), ids)

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        with self._opened() as state:
            return state.discard(state.subscription(subscription), ids)

    async def purge(self, subscription: str) -> int:
        with self._opened() as state:
            return state.purge(state.subscription(subscription))

    async def unsubscribe(self, subscription: str) -> None:
        with self._opened() as state:
            state.unsubscribe(subscription)

    async def replay(self, subscription: str, since: float | None = None) -> int:
        with self._opened() as state:
            return state.replay(state.subscription(subscription), since)

    @property
    def jobs(self) -> JobStore:
        return MemoryJobs(self._opened)

    @contextmanager
    def _opened(self) -> Iterator[State]:
        """The state, locked and up to date."""
        if self._closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._state is None:
            raise BrokerClosed("the broker is not connected; await connect() first")
        with self._state.lock:
            self._state.catch_up()
            yield self._state


def _shared_state(name: str, clock: Clock) -> State:
    with _named_lock:
        if name not in _named:
            _named[name] = State(clock)
        return _named[name]


def forget(url: str) -> None:
    """Drop what the brokers of a named URL keep, once none of them is used any more."""
    with _named_lock:
        _named.pop(url.removeprefix(_SCHEME), None)
