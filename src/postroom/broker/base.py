"""THE CONTRACT. What a broker must do, and nothing else it may do.

A :class:`Broker` connects, publishes and keeps; a :class:`Consumer` owns deliveries and settles
them. Bytes cross this boundary: codec, handler lookup, retry policy, backoff and the decision to
dead-letter live above it. The rules, each proven by ``postroom.testing.conformance``:

* Constructors do no I/O; ``connect`` does. After ``close`` every call raises ``BrokerClosed``;
  a second ``close`` is fine.
* Everything runs on one event loop; a broker is not shared between loops or processes.
* Only :mod:`postroom.errors` leave, with the client's exception as ``__cause__``.
* A confirmed message leaves a subscription only by ack, dead-lettering, expiry, cancel or purge.
* When a message moves, the copy is confirmed before the original goes (or both atomically).
* Subscriptions share nothing: each has its own copies, attempts and dead letters.
* Nothing unsupported is ignored: declare it in :class:`Capabilities` and raise
  ``UnsupportedOperation``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from postroom.doctor import Finding
from postroom.errors import PostroomError, SettlementError, UnsupportedOperation
from postroom.message import MAX_PRIORITY, NO_HEADERS, DeadLetter, Failure, Message
from postroom.store.base import JobStore


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker can do: data, read by the runtime, the conformance suite and the docs alike."""

    durability: Literal["none", "process", "fsync", "replicated"]
    """What a confirmed publish survives: nothing, death of every process, power loss, loss of a machine."""
    shared: bool
    """Several processes can use it at once."""
    death_notice: float
    """Seconds within which messages of a killed worker process run elsewhere; else the lease."""
    jobs: bool
    """Keeps job status and results itself (``Broker.jobs``), committed together with the settle."""
    transactional_publish: bool
    """``publish_in`` joins the caller's own database transaction."""
    delay: float | None
    """Longest delay in seconds; ``None``: any."""
    priorities: frozenset[int]
    """Those it keeps apart, besides 0: ``PRIORITIES``, or some, or none."""
    fifo: bool
    """Of one priority, the longer ready comes first, and what was released at once comes ahead of all.
    Else roughly so."""
    ordering: bool
    """Order by key in subscriptions declared ``ordered``."""
    patterns: bool
    """Subscriptions by topic pattern (``order.*``, ``order.#``)."""
    filters: bool
    """Subscriptions by header (``where``)."""
    deduplication: bool
    """``idempotency_key`` is honoured."""
    unique: bool = False
    """``Message.unique`` and ``replace`` are honoured."""
    known_ids: bool
    """Publishing an id that a subscription still holds or remembers makes no second message there."""
    start_notes: bool
    """Remembers which deliveries were ``started`` when their holder dies; else all it held count as started."""
    expiry: bool
    limits: bool
    """Honours ``Subscription.limit``."""
    exact_stats: bool
    """``stats`` are exact at their moment; else estimates that become right when all is quiet."""
    retention: bool
    """Keeps published events for later subscriptions (``start="earliest"``) and ``replay``."""
    max_message_size: int | None = None
    """Bytes of body the broker itself can take; ``None``: no limit of its own."""


PRIORITIES = frozenset(range(1, MAX_PRIORITY + 1))
"""All that a message can ask for. The conformance suite takes either all of them or none."""


class Topic(msgspec.Struct, frozen=True, kw_only=True):
    """A topic to be declared."""

    name: str
    queue: bool = False
    """A queue: exactly one subscription, of the same name; patterns do not match it."""
    retention: float = 0.0
    """Seconds for which published messages are kept for late subscriptions and replay."""


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """An independent, durable subscription to be declared. Its name is unique within the broker."""

    name: str
    pattern: str
    """A topic, or words with ``*`` (one word) and ``#`` (any number of words), split at dots."""
    where: Mapping[str, str] = NO_HEADERS
    """Only messages whose headers have all of these values."""
    start: Literal["latest", "earliest"] = "latest"
    """When first declared: only messages published from now on, or also the retained ones."""
    ordered: bool = False
    """Messages of one key are delivered one at a time in publish order; a retried one holds back
    its own key only. Messages without a key are unordered."""
    limit: int | None = None
    """Unsettled messages (not counting dead ones) above which ``publish`` answers ``QueueFull``."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One hand-over of one message to one consumer, under a lease."""

    message: Message
    subscription: str
    attempt: int
    """1 + the failures counted so far: retries, and deaths of processes that had started it."""
    suspect: bool = False
    """Its former holder died or froze while it ran: it may be the killer. Run it apart."""
    replayed: bool = False
    """It comes from ``Broker.replay``: again, although it may have ended before. Told by brokers that keep no jobs."""
    receipt: Any = None
    """The adapter's own handle (lease token, delivery tag); opaque to everyone else."""


class Ack(msgspec.Struct, frozen=True, gc=False):
    """Done. ``result`` (JSON) is kept for ``Message.result_ttl`` where the broker keeps jobs."""

    result: bytes | None = None


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """Failed: count it, remember the failure, deliver again not before ``delay`` seconds."""

    delay: float
    failure: Failure
    suspect: bool = False
    """Keep it a suspect: it killed the process that ran it."""


class Release(msgspec.Struct, frozen=True):
    """Give back uncounted, to be delivered not before ``delay`` seconds (0: at once, ahead of others)."""

    delay: float = 0.0


class Dead(msgspec.Struct, frozen=True):
    """Dead-letter it, with its whole history."""

    failure: Failure


class Cancel(msgspec.Struct, frozen=True):
    """End it as cancelled: its cancellation was requested while it ran."""


Outcome = Ack | Retry | Release | Dead | Cancel
"""Decided by pure functions above the contract; adapters only perform it."""


class SubscriptionStats(msgspec.Struct, frozen=True, kw_only=True):
    """One subscription in numbers, at one moment."""

    name: str
    pattern: str
    queue: bool
    ready: int
    delayed: int
    """Scheduled, waiting for a retry, or waiting behind their key."""
    running: int
    """Under a lease."""
    dead: int
    oldest: float | None
    """Age in seconds of the oldest ready message; ``None`` if none is ready."""


class Consumer(ABC):
    """Takes deliveries of one subscription and settles them. Made by ``Broker.consume``."""

    @abstractmethod
    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        """Lease up to ``max_messages`` ready messages; wait up to ``timeout`` seconds for the first.

        Returns as soon as there is at least one; ``[]`` when the time is over. Higher priority
        first, then the longer ready. Expired and cancelled messages are never delivered. A consumer is
        given a suspect only while it holds no other suspect, so at most one at a time. A cancelled
        call (``asyncio.CancelledError``) loses no message: what it had leased is released.
        """

    @abstractmethod
    def started(self, deliveries: Sequence[Delivery]) -> None:
        """Note that the handlers of these are about to run. No waiting, no I/O that can block.

        If the process dies, only deliveries noted here count as failed (``worker_lost``) and come
        back as suspects; the others are released. A broker that cannot keep such a note without a
        round trip counts every delivery it had handed out.
        """

    @abstractmethod
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        """Settle each delivery once; what was confirmed is durable on return.

        Returns, in order, ``None`` for settled or the error of that one: ``LeaseLost`` if its lease
        has passed to another, ``AlreadySettled`` if this consumer settled it before. A lease that has
        run out but that nobody took yet may be settled or refused. One refusal does not affect the
        others. Raises ``BrokerUnavailable`` if nothing is known of any.
        """

    @abstractmethod
    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Renew the leases for another full lease from now. Returns those that are lost."""

    @abstractmethod
    async def close(self) -> None:
        """Release at once, uncounted, all that is unsettled."""


class Broker(ABC):
    """Connects to one server or file, publishes to it, and keeps its topology and dead letters."""

    capabilities: ClassVar[Capabilities]

    @abstractmethod
    async def connect(self) -> None:
        """Open the connection and prepare storage. Raises ``BrokerUnavailable`` or ``ConfigurationError``."""

    @abstractmethod
    async def close(self) -> None:
        """Close consumers, flush what is under way, disconnect."""

    @abstractmethod
    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        """Create or update topology; repeating it changes nothing and loses nothing.

        What is not named is left alone. A queue is declared together with its subscription. A changed
        ``where``, ``limit`` or pattern applies to later messages.
        Raises ``ConfigurationError`` if a queue would get a second subscription.
        """

    @abstractmethod
    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        """Store each message in every matching subscription; confirmed (see ``durability``) on return.

        Returns, in order, the id under which each message is stored or the error of that one.
        The id differs from ``message.id`` where ``idempotency_key`` had been used for the same topic,
        name and body within its window: the first message's id. Errors per message: ``IdempotencyConflict``
        (same key, other name or body), ``QueueFull``, ``MessageTooLarge``, ``TopicNotFound`` (topic never
        declared). With ``message.unique`` the key is held instead as long as the first message waits or runs
        (``until_done``; dead is done), or waits for its first start (``until_started``); with ``replace`` a holder
        that waits is cancelled, and the new message takes the key. Publishing the same id to the same topic again is
        no second message for a subscription that still holds or remembers it (see ``known_ids``). Raises if the
        outcome of the whole batch is unknown.
        """

    @abstractmethod
    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        """A consumer whose deliveries are leased for ``lease`` seconds. Raises ``SubscriptionNotFound``."""

    @abstractmethod
    async def stats(self) -> list[SubscriptionStats]:
        """Every subscription in numbers, by name."""

    @abstractmethod
    async def dead_letters(
        self,
        subscription: str,
        *,
        ids: Sequence[str] | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[DeadLetter]:
        """Dead letters oldest first: those of ``ids``, or a page of ``limit`` that follows the id ``after``.

        If ``after`` is no longer dead the page begins where it stood, or at the first letter.
        """

    @abstractmethod
    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        """Move dead letters back into their subscription, ready, attempts counted from 1, history kept.

        Whoever redrives wants it handled: an ``expires_at`` that has passed no longer holds. Returns the ids
        that were moved. Dying half-way leaves each message in one of the two places.
        """

    @abstractmethod
    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        """Delete dead letters for good. Returns the ids that were deleted."""

    @abstractmethod
    async def purge(self, subscription: str) -> int:
        """Delete all waiting messages of a subscription (not the running, not the dead). Returns how many."""

    @abstractmethod
    async def unsubscribe(self, subscription: str) -> None:
        """Delete a subscription with all it holds, dead letters too. Raises ``SubscriptionNotFound``."""

    async def replay(self, subscription: str, since: float | None = None) -> int:
        """Deliver retained messages published since the unix time ``since`` (``None``: all) once more,
        to this subscription only, under their own ids. Returns how many."""
        raise UnsupportedOperation(f"{type(self).__name__} keeps no history to replay", "retention")

    def joins(self, connection: Any) -> bool:
        """Whether ``publish_in`` can use ``connection``: it is to the broker's own database. Needs no ``connect``."""
        return False

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        """``publish`` inside the open transaction of the user's own database ``connection``."""
        raise UnsupportedOperation(f"{type(self).__name__} cannot join a database transaction", "transactional_publish")

    async def apublish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        """:meth:`publish_in` for a ``connection`` that may be asynchronous; awaited on its own event loop."""
        return self.publish_in(connection, messages)

    async def plan(self) -> list[str]:
        """What ``migrate`` would run: SQL, one text for each step; ``[]`` if there is nothing to do. Only reads.

        Needs no ``connect``, which may refuse storage of another version; so does ``migrate``.
        """
        return []

    async def migrate(self) -> None:  # noqa: B027
        """Create or change what must be there before ``connect``: all of it, or nothing. Repeating it does nothing.

        Only for storage that is shared with other programs; a broker with storage of its own sees to it itself.
        """

    async def examine(self) -> list[Finding]:
        """What ``postroom doctor`` tells: each thing that could break a promise, looked at (``ok`` too).

        Settings, permissions, versions and room of the server or file. It only reads, and takes seconds, not minutes.
        The doctor also calls it after ``connect`` has failed, whose error it tells itself: then this answers with what
        can be seen without a connection, else ``[]``. What may not be looked at is a ``warning`` that says so. No
        finding holds a password.
        """
        return []

    @property
    def jobs(self) -> JobStore:
        """Status and results, where ``capabilities.jobs``."""
        hint = "App(store=…) or POSTROOM_STORE adds them"
        raise UnsupportedOperation(f"{type(self).__name__} keeps no job status and no results; {hint}", "jobs")
