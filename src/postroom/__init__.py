"""Background jobs and events for Python, with the same delivery guarantees on every broker."""

from postroom.app import App
from postroom.config import RetryPolicy, exponential
from postroom.context import INJECTED, Context
from postroom.errors import (
    AlreadySettled,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    CodecError,
    ConfigurationError,
    DecodeError,
    EncodeError,
    IdempotencyConflict,
    JobCancelled,
    JobError,
    JobFailed,
    JobNotFound,
    LeaseLost,
    MessageTooLarge,
    PostroomError,
    PublishFailed,
    QueueFull,
    SettlementError,
    SubscriptionNotFound,
    TopicNotFound,
    UnsupportedOperation,
    ValidationError,
)
from postroom.handler import Upload
from postroom.message import DeadLetter, Failure, JobState, Message, Progress
from postroom.producer.job import Job, JobStatus
from postroom.producer.task import Task
from postroom.producer.topic import Topic
from postroom.signals import AlreadyProcessed, Reject, Retry, Snooze
from postroom.store.inbox import acreate_inbox, apurge_inbox, create_inbox, inbox_stats, purge_inbox
from postroom.store.outbox import acreate_outbox, create_outbox, outbox_stats

__all__ = [
    "INJECTED",
    "AlreadyProcessed",
    "AlreadySettled",
    "App",
    "BrokerClosed",
    "BrokerError",
    "BrokerUnavailable",
    "CodecError",
    "ConfigurationError",
    "Context",
    "DeadLetter",
    "DecodeError",
    "EncodeError",
    "Failure",
    "IdempotencyConflict",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobNotFound",
    "JobState",
    "JobStatus",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "PostroomError",
    "Progress",
    "PublishFailed",
    "QueueFull",
    "Reject",
    "Retry",
    "RetryPolicy",
    "SettlementError",
    "Snooze",
    "SubscriptionNotFound",
    "Task",
    "Topic",
    "TopicNotFound",
    "UnsupportedOperation",
    "Upload",
    "ValidationError",
    "acreate_inbox",
    "acreate_outbox",
    "apurge_inbox",
    "create_inbox",
    "create_outbox",
    "exponential",
    "inbox_stats",
    "outbox_stats",
    "purge_inbox",
]
