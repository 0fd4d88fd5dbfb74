"""What must be remembered beside the messages: status, results, progress, cancellation.

A broker that can keeps it itself (:class:`JobStore`). For the others a :class:`Store` does, together with
``postroom.store.beside``, which tells it what happens to each message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from postroom.doctor import Finding
from postroom.errors import PostroomError, UnsupportedOperation
from postroom.message import Failure, JobRecord, JobState, Message, Progress

CancelAnswer = Literal["cancelled", "requested", "finished", "unknown"]
"""``cancelled``: it will never start. ``requested``: it runs, its worker is told.
``finished``: too late. ``unknown``: no such job."""


class JobStore(ABC):
    """Status of jobs by id. A state never goes backwards once final, except by a redrive."""

    @abstractmethod
    async def get(self, job_id: str) -> list[JobRecord]:
        """The job's record; for an event one record for each subscription that got a copy.

        ``[]`` if the id is unknown. An event that no subscription wanted has one record with an empty
        ``subscription``, succeeded, for as long as it is retained.
        """

    @abstractmethod
    async def search(
        self,
        *,
        subscription: str | None = None,
        state: JobState | None = None,
        limit: int = 100,
    ) -> list[JobRecord]:
        """The newest records first."""

    @abstractmethod
    async def cancel(self, job_id: str) -> CancelAnswer:
        """Cancel every copy that has not ended."""

    @abstractmethod
    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        """Record the progress of running deliveries, given as ``(delivery, progress)``.

        Ignored for a delivery whose lease is lost (a zombie must not write a status)."""

    @abstractmethod
    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        """Those of the running ``deliveries`` whose cancellation was requested."""


class Admission(NamedTuple):
    """How a message that is about to be published stands to those before it."""

    id: str
    """Its own, or that of the first message with its idempotency key."""
    publish: bool
    """Whether the broker is still to be given it; false if the earlier one is known to be there."""
    replaces: str | None = None
    """The message that waits under its key, to be cancelled once the broker has this one."""


class Claim(NamedTuple):
    """One delivery as the store sees it. ``token`` is the holder's: what bears another is refused."""

    message: Message
    subscription: str
    attempt: int
    suspect: bool
    token: str
    copy: str
    """Which publish of the message it comes from; empty for foreign messages, which are all one."""
    replayed: bool


class Done(NamedTuple):
    """The verdict on a claim, or its outcome: it has succeeded."""

    result: bytes | None = None


class Cancelled(NamedTuple):
    """The verdict on a claim, or its outcome: it was cancelled."""


class Buried(NamedTuple):
    """The verdict on a claim, or its outcome: it is dead."""

    failure: Failure


End = Done | Cancelled | Buried


class Again(NamedTuple):
    """The message waits for its next delivery. ``failure``: why, if that counts."""

    delay: float
    failure: Failure | None


class Store(ABC):
    """Keeps records and idempotency keys for a broker that cannot.

    Broker and store cannot change in one step, so each method says what a crash on either side of it means.
    The store's word is final on what has ended; the broker's on what is still to be delivered.
    Raises ``BrokerUnavailable`` where it cannot answer.
    """

    unique: ClassVar[bool] = False
    """``Message.unique`` and ``replace`` are honoured by ``admit`` and ``replaced``."""
    jobs: JobStore
    """Deliveries are told by ``Delivery.receipt.token``."""

    @abstractmethod
    async def connect(self) -> None:
        """Open it. Raises ``BrokerUnavailable`` or ``ConfigurationError``."""

    async def plan(self) -> list[str]:
        """See ``Broker.plan``."""
        return []

    async def migrate(self) -> None:  # noqa: B027
        """See ``Broker.migrate``."""

    @abstractmethod
    async def close(self) -> None:
        """Write what is under way, then close it; a second call is fine."""

    async def examine(self) -> list[Finding]:
        """See ``Broker.examine``."""
        return []

    @abstractmethod
    async def declare(self, topics: Sequence[Any], subscriptions: Sequence[Any]) -> None:
        """Remember what was declared, to know which subscriptions a message will go to.

        ``Topic`` and ``Subscription`` of ``postroom.broker.base``.
        """

    @abstractmethod
    async def admit(self, messages: Sequence[Message]) -> list[Admission | PostroomError]:
        """Before publishing: remember each for the subscriptions that will get it, and its key.

        ``IdempotencyConflict`` for a key with another payload; keys of unique messages as in ``Broker.publish``.
        After a crash here the key leads to a message
        nobody was promised; whoever uses the key again publishes it, under the same id.
        """

    @abstractmethod
    async def confirm(self, ids: Sequence[str]) -> None:
        """After the broker has confirmed: nobody need publish these again."""

    async def replaced(self, ids: Sequence[str]) -> None:
        """After what replaces these was confirmed: they are cancelled if they still wait. After a crash before it
        both are there."""
        raise UnsupportedOperation(f"{type(self).__name__} knows no unique jobs", "unique")

    @abstractmethod
    async def withdraw(self, ids: Sequence[str]) -> None:
        """The broker has refused these: they and their keys are forgotten, unless confirmed by another publish."""

    @abstractmethod
    async def deliver(self, claims: Sequence[Claim]) -> list[End | None]:
        """Before handing out: note who holds each. Not ``None``: it has ended; tell the broker, run nothing.

        Of several copies of one message, as uncertain publishes leave them, the first that is delivered counts;
        the others are ``Done``.
        """

    @abstractmethod
    async def finish(self, ends: Sequence[tuple[Claim, End]]) -> list[bool]:
        """Before the broker is told: it has ended so. False if the claim is no longer the holder's.

        After a crash here the broker delivers it once more, and ``deliver`` answers how it ended.
        """

    @abstractmethod
    async def buried(self, claims: Sequence[Claim]) -> None:
        """After the broker has put these among its dead letters: delivered again, they were redriven."""

    @abstractmethod
    async def again(self, claims: Sequence[tuple[Claim, Again]]) -> None:
        """With a failure: before the broker takes them back; after a crash here they come again when the lease ends.

        Without: after it has; after a crash before it the record says running for a while. A claim that is no longer
        the holder's is left alone, so that doing it twice is fine.
        """

    @abstractmethod
    async def redriving(self, subscription: str, ids: Sequence[str]) -> None:
        """Before the broker redrives these dead letters."""

    @abstractmethod
    async def redriven(self, subscription: str, ids: Sequence[str]) -> None:
        """After it has: they are ready, unless they run already."""

    @abstractmethod
    async def discarded(self, subscription: str, ids: Sequence[str]) -> None:
        """The broker has deleted these dead letters; their records are kept for their time."""

    @abstractmethod
    async def purged(self, subscription: str, before: float) -> None:
        """The broker has deleted what waited; those published before are shown as cancelled.

        One of them that is delivered all the same is run: it was there after the purge.
        """

    @abstractmethod
    async def unsubscribed(self, subscription: str) -> None:
        """Forget the records of a subscription that was deleted."""
