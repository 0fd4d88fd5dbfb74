"""A broker whose queues have lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from postroom.broker.base import Broker, Capabilities, Consumer, Subscription, SubscriptionStats, Topic
from postroom.broker.lanes.consumer import LaneConsumer
from postroom.broker.lanes.names import OPTION, lane_of, parts_of
from postroom.clock import Clock, SystemClock
from postroom.doctor import Finding
from postroom.errors import (
    ConfigurationError,
    PostroomError,
    SubscriptionNotFound,
    TopicNotFound,
    UnsupportedOperation,
)
from postroom.message import DeadLetter, Message

T = TypeVar("T")

_PAGE = 1000
"""Dead letters read at once."""


class LanedBroker(Broker):
    """``broker`` with the priorities ``levels`` for jobs, in queues without ``ordered``."""

    def __init__(self, broker: Broker, levels: frozenset[int], *, clock: Clock | None = None) -> None:
        """Raises ``ConfigurationError`` for a broker that needs no lanes."""
        can = broker.capabilities
        if can.priorities or can.jobs or can.transactional_publish:
            raise ConfigurationError(f"broker URL: {OPTION}=…: this broker has priorities of its own; leave it out")
        self._broker = broker
        self._higher = sorted(levels)
        self._levels = (0, *self._higher)
        self._clock: Clock = clock or SystemClock()

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        # The others would hold for each lane; a store beside it makes all but the limits good.
        return msgspec.structs.replace(
            self._broker.capabilities,
            priorities=frozenset(self._higher),
            limits=False,
            deduplication=False,
            unique=False,
            known_ids=False,
        )

    async def connect(self) -> None:
        await self._broker.connect()

    async def close(self) -> None:
        await self._broker.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        for name in (*(topic.name for topic in topics), *(subscription.name for subscription in subscriptions)):
            if parts_of(name)[1]:
                raise ConfigurationError(f"{name!r}: such names are kept for priorities; choose another")
        queues = {topic.name for topic in topics if topic.queue}
        lanes = [
            msgspec.structs.replace(
                subscription, name=lane_of(subscription.name, level), pattern=lane_of(subscription.name, level)
            )
            for subscription in subscriptions
            if subscription.name in queues and not subscription.ordered
            for level in self._higher
        ]
        made = [Topic(name=lane.name, queue=True) for lane in lanes]
        await self._broker.declare([*topics, *made], [*subscriptions, *lanes])

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        answers = await self._broker.publish([_into_lane(message) for message in messages])
        return [_told(message, answer) for message, answer in zip(messages, answers, strict=True)]

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        opened = await self._ask(subscription, lambda name: self._broker.consume(name, lease=lease))
        failed = [answer for answer in opened if isinstance(answer, BaseException)]
        lanes = {lane: level for level, lane in zip(self._levels, opened, strict=True) if isinstance(lane, Consumer)}
        if failed:
            for lane in lanes:
                await lane.close()
            raise failed[0]
        return LaneConsumer(subscription, lanes, lease, self._clock) if len(lanes) > 1 else next(iter(lanes))

    async def stats(self) -> list[SubscriptionStats]:
        merged: dict[str, SubscriptionStats] = {}
        # By name, so a queue comes before its lanes.
        for stats in await self._broker.stats():
            queue, _ = parts_of(stats.name)
            merged[queue] = _sum(merged[queue], stats) if queue in merged else stats
        return list(merged.values())

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        if ids is not None:
            found = await self._everywhere(subscription, lambda name: self._broker.dead_letters(name, ids=ids))
            return _in_order(found)
        letters = _in_order(await self._everywhere(subscription, self._all_letters))
        place = next((at + 1 for at, letter in enumerate(letters) if letter.message.id == after), 0)
        return letters[place : place + limit]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self._everywhere(subscription, lambda name: self._broker.redrive(name, ids))

    async def discard(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self._everywhere(subscription, lambda name: self._broker.discard(name, ids))

    async def purge(self, subscription: str) -> int:
        return sum(await self._all(subscription, self._broker.purge))

    async def unsubscribe(self, subscription: str) -> None:
        # The queue itself last: until it is gone, whoever was interrupted can begin anew.
        for level in self._higher:
            with suppress(SubscriptionNotFound):
                await self._broker.unsubscribe(lane_of(subscription, level))
        await self._broker.unsubscribe(subscription)

    async def replay(self, subscription: str, since: float | None = None) -> int:
        return await self._broker.replay(subscription, since)

    async def plan(self) -> list[str]:
        return await self._broker.plan()

    async def migrate(self) -> None:
        await self._broker.migrate()

    async def examine(self) -> list[Finding]:
        findings = await self._broker.examine()
        if any(finding.level == "error" for finding in findings):
            return findings
        return [*findings, _examined(await self._broker.stats(), self._levels)]

    async def _ask(self, queue: str, ask: Callable[[str], Awaitable[T]]) -> list[T | BaseException | None]:
        """What each level has answered; ``None`` of a lane that was not declared, as of what is ordered or no queue."""
        answers = await asyncio.gather(*(ask(lane_of(queue, level)) for level in self._levels), return_exceptions=True)
        return [
            None if level and isinstance(answer, SubscriptionNotFound) else answer
            for level, answer in zip(self._levels, answers, strict=True)
        ]

    async def _all(self, queue: str, ask: Callable[[str], Awaitable[T]]) -> list[T]:
        """The answers of a queue and its lanes. Raises the first error, once all have answered."""
        answers: list[T] = []
        for answer in await self._ask(queue, ask):
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None:
                answers.append(answer)
        return answers

    async def _everywhere(self, queue: str, ask: Callable[[str], Awaitable[list[T]]]) -> list[T]:
        return [item for answer in await self._all(queue, ask) for item in answer]

    async def _all_letters(self, name: str) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        while True:
            after = letters[-1].message.id if letters else None
            page = await self._broker.dead_letters(name, after=after, limit=_PAGE)
            letters += page
            if len(page) < _PAGE:
                return letters


def _into_lane(message: Message) -> Message:
    if not message.priority:
        return message
    return msgspec.structs.replace(message, topic=lane_of(message.topic, message.priority), priority=0)


def _told(message: Message, answer: str | PostroomError) -> str | PostroomError:
    if not (message.priority and isinstance(answer, TopicNotFound)):
        return answer
    return UnsupportedOperation(
        f"priority={message.priority}: {message.topic!r} has no lane for it; priorities are for jobs, in queues "
        f"without ordered=True, declared with ?{OPTION}={message.priority} in the broker's URL",
        "priorities",
    )


def _in_order(letters: Iterable[DeadLetter]) -> list[DeadLetter]:
    """As of one queue, the oldest first."""
    return sorted(map(_letter, letters), key=lambda letter: letter.dead_at)


def _letter(letter: DeadLetter) -> DeadLetter:
    queue, level = parts_of(letter.subscription)
    if not level:
        return letter
    message = msgspec.structs.replace(letter.message, topic=queue, priority=level)
    return msgspec.structs.replace(letter, subscription=queue, message=message)


def _sum(queue: SubscriptionStats, lane: SubscriptionStats) -> SubscriptionStats:
    ages = [stats.oldest for stats in (queue, lane) if stats.oldest is not None]
    return msgspec.structs.replace(
        queue,
        ready=queue.ready + lane.ready,
        delayed=queue.delayed + lane.delayed,
        running=queue.running + lane.running,
        dead=queue.dead + lane.dead,
        oldest=max(ages, default=None),
    )


def _examined(everything: Iterable[SubscriptionStats], levels: Sequence[int]) -> Finding:
    """Lanes that a URL with more levels has filled, and that nobody with this URL looks into."""
    known = {lane_of(parts_of(stats.name)[0], level) for stats in everything for level in levels}
    left = [stats.name for stats in everything if stats.name not in known and stats.ready + stats.delayed]
    if not left:
        return Finding(level="ok", title="priorities", detail="every lane that holds messages is served")
    named = ",".join(sorted({*map(str, levels[1:]), *(name[-1] for name in left)}))
    return Finding(
        level="error",
        title="priorities",
        detail=f"messages wait where this URL does not look: {', '.join(sorted(left))}",
        remedy=f"add ?{OPTION}={named} to the URL of the workers until these are empty",
    )
