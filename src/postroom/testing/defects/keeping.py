"""Defects of brokers: what is stored, for whom, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from postroom.broker.base import (
    Capabilities,
    Subscription,
    SubscriptionStats,
    Topic,
)
from postroom.errors import BrokerClosed, PostroomError, TopicNotFound
from postroom.message import DeadLetter, JobRecord, JobState, Message, new_id
from postroom.store.base import JobStore
from postroom.testing.defects.wrapper import DefectiveBroker


class DropsAPublish(DefectiveBroker):
    """Confirms the last of a batch without storing it."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        if len(messages) < 2:
            return await super().publish(messages)
        return [*await super().publish(messages[:-1]), messages[-1].id]


class AltersHeaders(DefectiveBroker):
    """Lower-cases the values of headers."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        altered = [
            msgspec.structs.replace(m, headers={name.lower(): value.lower() for name, value in m.headers.items()})
            for m in messages
        ]
        return await super().publish(altered)


class ReordersKeys(DefectiveBroker):
    """Ignores that a subscription is ordered."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare(topics, [msgspec.structs.replace(each, ordered=False) for each in subscriptions])


class ForgetsHistory(DefectiveBroker):
    """Keeps only the last failure of a dead letter."""

    async def dead_letters(self, subscription: str, **options: Any) -> list[DeadLetter]:
        letters = await super().dead_letters(subscription, **options)
        return [msgspec.structs.replace(letter, failures=letter.failures[-1:]) for letter in letters]


class LeaksSubscriptions(DefectiveBroker):
    """Every subscription gets all that is published, whatever its filter."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare(topics, [msgspec.structs.replace(each, where={}) for each in subscriptions])


class RedrivesTwice(DefectiveBroker):
    """A redrive leaves a second message behind."""

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        letters = await self.sound.dead_letters(subscription, ids=ids)
        moved = await super().redrive(subscription, ids)
        await self.sound.publish([msgspec.structs.replace(letter.message, id=new_id()) for letter in letters])
        return moved


class _BackwardJobs(JobStore):
    def __init__(self, sound: JobStore) -> None:
        self._sound = sound

    async def get(self, job_id: str) -> list[JobRecord]:
        return [_backward(record) for record in await self._sound.get(job_id)]

    async def search(self, **options: Any) -> list[JobRecord]:
        return [_backward(record) for record in await self._sound.search(**options)]

    async def cancel(self, job_id: str) -> Any:
        return await self._sound.cancel(job_id)

    async def report(self, updates: Sequence[tuple[Any, Any]]) -> None:
        await self._sound.report(updates)

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        return await self._sound.cancelled(deliveries)


def _backward(record: JobRecord) -> JobRecord:
    ended = record.state is JobState.SUCCEEDED
    return msgspec.structs.replace(record, state=JobState.RUNNING) if ended else record


class StatusGoesBackwards(DefectiveBroker):
    """Shows what has succeeded as still running."""

    @property
    def jobs(self) -> JobStore:
        return _BackwardJobs(self.sound.jobs)


class IgnoresDedup(DefectiveBroker):
    """Knows no idempotency keys."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([msgspec.structs.replace(m, idempotency_key=None) for m in messages])


class IgnoresUniqueness(DefectiveBroker):
    """Every unique message is one of its own."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish(
            [msgspec.structs.replace(m, unique=None, idempotency_key=None if m.unique else m.idempotency_key)
             for m in messages]
        )  # fmt: skip


class HoldsKeysForGood(DefectiveBroker):
    """The key of a unique message is held for the usual window, whatever becomes of it."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([msgspec.structs.replace(m, unique=None, replace=False) for m in messages])


class ReplacesNothing(DefectiveBroker):
    """What is to be replaced stays beside what replaces it."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish(
            [msgspec.structs.replace(m, unique=None, idempotency_key=None) if m.replace else m for m in messages]
        )


class IgnoresExpiry(DefectiveBroker):
    """Delivers however late."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([msgspec.structs.replace(m, expires_at=None) for m in messages])


class IgnoresPriority(DefectiveBroker):
    """All are equally urgent."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([msgspec.structs.replace(m, priority=0) for m in messages])


class IgnoresLimits(DefectiveBroker):
    """Takes whatever comes."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare(topics, [msgspec.structs.replace(each, limit=None) for each in subscriptions])


class RetainsNothing(DefectiveBroker):
    """Has no history for the late."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare([msgspec.structs.replace(each, retention=0.0) for each in topics], subscriptions)


class PurgesNothing(DefectiveBroker):
    """Says how many it has purged, and has not."""

    async def purge(self, subscription: str) -> int:
        stats = next(each for each in await super().stats() if each.name == subscription)
        return stats.ready + stats.delayed


class PurgesTheDead(DefectiveBroker):
    """A purge takes the dead letters along."""

    async def purge(self, subscription: str) -> int:
        letters = await self.sound.dead_letters(subscription)
        await self.sound.discard(subscription, [letter.message.id for letter in letters])
        return await super().purge(subscription)


class MangledBodies(DefectiveBroker):
    """Takes bodies for text, nothing for null, and cuts off what is long; keeps only a few headers."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish(
            [
                msgspec.structs.replace(
                    m,
                    body=m.body.decode("utf-8", "replace").encode()[:100_000] or b"null",
                    headers=dict([*m.headers.items()][:20]),
                )
                for m in messages
            ]
        )


class SwallowsErrors(DefectiveBroker):
    """Says yes to what it does not do."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        with suppress(PostroomError):
            await super().declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        answers = await super().publish(messages)
        return [m.id if isinstance(a, TopicNotFound) else a for m, a in zip(messages, answers, strict=True)]

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await super().discard(subscription, ids) if ids else []

    def publish_in(self, connection: Any, messages: Sequence[Message]) -> list[str | PostroomError]:
        return [message.id for message in messages]


class ConfusesStats(DefectiveBroker):
    """Last name first, and everything is of age 0."""

    async def stats(self) -> list[SubscriptionStats]:
        return [msgspec.structs.replace(each, oldest=each.oldest or 0.0) for each in (await super().stats())[::-1]]


class RetainsEverything(DefectiveBroker):
    """Every topic is kept, and every subscription begins with all of it."""

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare(
            [msgspec.structs.replace(each, retention=each.retention or 1e9) for each in topics],
            [msgspec.structs.replace(each, start="earliest") for each in subscriptions],
        )


class MistakesThePast(DefectiveBroker):
    """Takes the distance to a time that is over for one to come."""

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish(
            [
                m
                if m.not_before is None
                else msgspec.structs.replace(m, not_before=m.created_at + abs(m.not_before - m.created_at))
                for m in messages
            ]
        )


class _GhostJobs(_BackwardJobs):
    async def get(self, job_id: str) -> list[JobRecord]:
        with suppress(BrokerClosed):
            return await super().get(job_id)
        return []

    async def cancel(self, job_id: str) -> Any:
        answer = await super().cancel(job_id)
        return "finished" if answer == "unknown" else answer


class KnowsEveryJob(DefectiveBroker):
    """Cancels jobs that never were, and answers after it was closed."""

    @property
    def jobs(self) -> JobStore:
        return _GhostJobs(self.sound.jobs)


class NeedsItsConnection(DefectiveBroker):
    """Cannot be closed unless it was connected."""

    connected = False

    async def connect(self) -> None:
        await super().connect()
        self.connected = True

    async def close(self) -> None:
        assert self.connected, "not connected"
        await super().close()


class ClaimsALimit(DefectiveBroker):
    """Declares a largest size, and takes more."""

    def declared(self) -> Capabilities:
        return msgspec.structs.replace(super().declared(), max_message_size=1000)
