"""Every error Postroom raises.

::

    PostroomError
    ├── ConfigurationError
    ├── BrokerError
    │   ├── BrokerUnavailable          may be tried again
    │   ├── BrokerClosed
    │   ├── TopicNotFound
    │   ├── SubscriptionNotFound
    │   ├── PublishFailed              .unconfirmed
    │   ├── MessageTooLarge
    │   ├── QueueFull
    │   ├── UnsupportedOperation       .capability
    │   └── SettlementError
    │       ├── AlreadySettled
    │       └── LeaseLost
    ├── CodecError
    │   ├── EncodeError
    │   └── DecodeError
    ├── ValidationError                .field
    └── JobError
        ├── JobNotFound
        ├── JobFailed                  .failure
        ├── JobCancelled
        └── IdempotencyConflict

Only these leave a broker adapter; the client library's own exception is the ``__cause__``.
The signals a handler may raise (``Retry``, ``Snooze``, ``Reject``, ``AlreadyProcessed``) are
in :mod:`postroom.signals`: they are answers, not errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postroom.message import Failure


class PostroomError(Exception):
    """The root: ``except PostroomError`` catches whatever Postroom itself raises."""


class ConfigurationError(PostroomError):
    """The app, a task, a URL or an option is wrong; nothing was started."""


class BrokerError(PostroomError):
    """The broker did not do what was asked."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached or cannot write now. The same call may succeed later."""


class BrokerClosed(BrokerError):
    """The broker or consumer was closed; open a new one."""


class TopicNotFound(BrokerError):
    """No queue or topic of that name is known to the broker."""


class SubscriptionNotFound(BrokerError):
    """No subscription of that name is known to the broker."""


class PublishFailed(BrokerError):
    """Some messages of a batch were not confirmed.

    ``unconfirmed`` holds the ids of those messages; every other message of the batch is stored.
    Publishing an unconfirmed message again with the same id is safe.
    """

    def __init__(self, message: str, unconfirmed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.unconfirmed: list[str] = list(unconfirmed)


class MessageTooLarge(BrokerError):
    """The encoded message is larger than the limit (256 KiB unless set otherwise)."""


class QueueFull(BrokerError):
    """The queue holds as many waiting messages as it may; try again later."""


class UnsupportedOperation(BrokerError):
    """The broker cannot do this. ``capability`` names the field of ``Capabilities`` that says so."""

    def __init__(self, message: str, capability: str = "") -> None:
        super().__init__(message)
        self.capability = capability


class SettlementError(BrokerError):
    """A delivery could not be settled; the message is where it was."""


class AlreadySettled(SettlementError):
    """The delivery was settled before; the first settlement stands."""


class LeaseLost(SettlementError):
    """The lease ended and the message belongs to somebody else; the outcome was refused."""


class CodecError(PostroomError):
    """A value cannot be turned into bytes, or bytes into a value."""


class EncodeError(CodecError):
    """JSON cannot carry this value."""


class DecodeError(CodecError):
    """The bytes are not what they should be."""


class ValidationError(PostroomError):
    """An argument or event does not have the declared type. ``field`` names the culprit."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class JobError(PostroomError):
    """Something about one job."""


class JobNotFound(JobError):
    """No job of this id is known: it never existed, or its retention is over."""


class JobFailed(JobError):
    """The job is dead. ``failure`` is its last failure, with the traceback as text."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class JobCancelled(JobError):
    """The job was cancelled, or expired before it ran."""


class IdempotencyConflict(JobError):
    """The idempotency key was used before with a different payload."""
