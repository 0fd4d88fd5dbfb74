"""All that a memory broker keeps, and everything that can happen to a copy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from postroom.broker.base import Ack, Cancel, Dead, Delivery, Outcome, Release, Retry, Subscription, Topic
from postroom.broker.memory.alarms import Alarms
from postroom.broker.memory.copy import Copy, Lease
from postroom.broker.memory.dedup import Dedup
from postroom.broker.memory.subscription import SubscriptionState
from postroom.broker.memory.topology import check
from postroom.broker.routing import wants
from postroom.clock import Clock
from postroom.errors import PostroomError, QueueFull, SubscriptionNotFound, TopicNotFound
from postroom.message import Failure, JobState, Message
from postroom.store.base import CancelAnswer


class TopicState:
    """A topic and, where it retains, what was published to it: (time, message), oldest first."""

    def __init__(self, declared: Topic) -> None:
        self.declared = declared
        self._log: deque[tuple[float, Message]] = deque()

    def retain(self, message: Message, now: float) -> None:
        if self.declared.retention > 0:
            self._log.append((now, message))
        self.retained(now)

    def retained(self, now: float) -> Sequence[tuple[float, Message]]:
        while self._log and self._log[0][0] + self.declared.retention <= now:
            self._log.popleft()
        return self._log


class State:
    """Shared by the brokers of one name. Whoever calls a method holds ``lock`` and has called ``catch_up``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.now = clock.now()
        self.subscriptions: dict[str, SubscriptionState] = {}
        self.alarms = Alarms()
        self.by_id: dict[str, dict[str, Copy]] = {}
        """Message id -> subscription -> copy."""
        self._topics: dict[str, TopicState] = {}
        self._dedup = Dedup()
        self._numbers = count(1)
        self._deaths = count(1)
        self._unwanted = SubscriptionState(Subscription(name="", pattern=""))
        """Records of messages that no subscription wanted."""

    # Time

    def catch_up(self) -> None:
        """Let everything happen that is due."""
        self.now = max(self.now, self.clock.now())
        while (copy := self.alarms.pop(self.now)) is not None:
            self._look_at(copy)
            self._set_alarm(copy)
        self._dedup.forget(self.now)

    def _look_at(self, copy: Copy) -> None:
        if copy.end is not None:
            if copy.forget_at is not None and copy.forget_at <= self.now:
                self._forget(copy)
        elif copy.lease is not None:
            if copy.lease.until <= self.now:
                self._recover(copy, copy.lease)
        elif copy.expires_at is not None and copy.expires_at <= self.now:
            self._end(copy, JobState.EXPIRED)
        else:
            copy.subscription.place(copy, self.now)

    def _set_alarm(self, copy: Copy) -> None:
        self.alarms.set(copy, copy.due(self.now))

    # Topology

    def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        known = {name: topic.declared for name, topic in self._topics.items()}
        check(known, [state.declared for state in self.subscriptions.values()], topics, subscriptions)
        for topic in topics:
            self._topics.setdefault(topic.name, TopicState(topic)).declared = topic
        for subscription in subscriptions:
            state = self.subscriptions.get(subscription.name)
            if state is not None:
                state.redeclare(subscription, self.now)
            else:
                state = self.subscriptions[subscription.name] = SubscriptionState(subscription)
                if subscription.start == "earliest":
                    for message in self._retained_for(subscription, None):
                        self._add(state, message)

    def subscription(self, name: str) -> SubscriptionState:
        if name not in self.subscriptions:
            raise SubscriptionNotFound(f"no subscription {name!r}; declare it first")
        return self.subscriptions[name]

    def check_subscribed(self, state: SubscriptionState) -> None:
        """Raises ``SubscriptionNotFound`` if it was deleted while somebody consumed it."""
        if self.subscriptions.get(state.name) is not state:
            raise SubscriptionNotFound(f"subscription {state.name!r} was deleted; declare it again")

    def copies_of(self, message_id: str) -> list[Copy]:
        """By subscription; the note that nobody wanted it counts only while that is so."""
        copies = self.by_id.get(message_id, {})
        return [copy for name, copy in copies.items() if name or len(copies) == 1]

    def unsubscribe(self, name: str) -> None:
        state = self.subscription(name)
        for copy in list(state.copies.values()):
            if copy.end is None:
                state.leave(copy, self.now)
            self._forget(copy)
        del self.subscriptions[name]
        if self.is_queue(name):
            # Without its subscription it would accept jobs and drop them.
            del self._topics[name]
        state.wake()

    def is_queue(self, name: str) -> bool:
        return name in self._topics and self._topics[name].declared.queue

    def _wanting(self, message: Message) -> list[SubscriptionState]:
        if self.is_queue(message.topic):
            return [self.subscriptions[message.topic]]
        # A queue's subscription may have the shape of a pattern that fits: it is for the queue alone.
        return [
            state
            for state in self.subscriptions.values()
            if not self.is_queue(state.name) and wants(state.declared, message)
        ]

    def _retained_for(self, subscription: Subscription, since: float | None) -> list[Message]:
        found = [
            (at, message)
            for topic in self._topics.values()
            if not topic.declared.queue or topic.declared.name == subscription.name
            for at, message in topic.retained(self.now)
            if (since is None or at >= since) and wants(subscription, message) and not _is_over(message, self.now)
        ]
        return [message for _, message in sorted(found, key=lambda entry: entry[0])]

    # In

    def publish(self, message: Message) -> str | PostroomError:
        """All copies or none."""
        topic = self._topics.get(message.topic)
        if topic is None:
            return TopicNotFound(f"no queue or topic {message.topic!r}; declare it first")
        replaced = self._replaced_by(message)
        first = self._dedup.find(message) if not replaced and self._is_held(message) else None
        if first is not None:
            return first
        holders = self.by_id.get(message.id, {})
        wanting = self._wanting(message)
        targets = [state for state in wanting if state.name not in holders]
        full = [state.name for state in targets if state.full and not replaced]
        if full:
            return QueueFull(f"{', '.join(full)}: as many messages wait as its limit allows; try again later")
        if holders and not targets:
            return message.id
        for copy in replaced:
            self._cancel(copy)
        for state in targets:
            self._add(state, message)
        if not wanting:
            self._note_unwanted(message, max(topic.declared.retention, message.result_ttl))
        topic.retain(message, self.now)
        self._dedup.remember(message, self.now)
        return message.id

    def _is_held(self, message: Message) -> bool:
        """Whether the key of this message leads to an earlier one."""
        if message.unique is None:
            return message.idempotency_key is not None
        return bool(self._holding(message))

    def _replaced_by(self, message: Message) -> list[Copy]:
        # Published once more, under its own id, a message does not replace itself.
        return [copy for copy in self._holding(message) if message.replace and copy.message.id != message.id]

    def _holding(self, message: Message) -> list[Copy]:
        """What keeps the key of a unique message."""
        waiting = (JobState.SCHEDULED, JobState.READY)
        return [
            copy
            for copy in self.copies_of(self._dedup.holder(message) or "")
            if (copy.end is None if message.unique == "until_done" else copy.state(self.now) in waiting)
        ]

    def replay(self, state: SubscriptionState, since: float | None) -> int:
        replayed = 0
        for message in self._retained_for(state.declared, since):
            copy = state.copies.get(message.id)
            if copy is None:
                self._add(state, message)
            elif copy.end is None:
                continue  # It is still to be delivered.
            else:
                state.dead.pop(message.id, None)
                copy.begin_anew(message, self.now)
                copy.number = next(self._numbers)
                copy.expires_at = message.expires_at
                self._enter(copy)
            state.copies[message.id].replayed = True
            replayed += 1
        return replayed

    def _add(self, state: SubscriptionState, message: Message) -> None:
        copy = Copy(message, state, next(self._numbers), self.now)
        self.by_id.setdefault(message.id, {})[state.name] = copy
        self._enter(copy)

    def _enter(self, copy: Copy) -> None:
        copy.subscription.enter(copy, self.now)
        self._look_at(copy)
        self._set_alarm(copy)

    def _note_unwanted(self, message: Message, keep: float) -> None:
        copy = Copy(message, self._unwanted, next(self._numbers), self.now)
        copy.finish(JobState.SUCCEEDED, self.now, keep)
        self._unwanted.copies[message.id] = copy
        self.by_id.setdefault(message.id, {})[""] = copy
        self._set_alarm(copy)

    # Out

    def claim(self, state: SubscriptionState, consumer: object, count: int, suspects: int, lease: float) -> list[Lease]:
        """Lease up to ``count`` ready copies, at most ``suspects`` of them suspect."""
        leases = []
        for copy in state.next_ready(count, suspects):
            state.displace(copy)
            copy.ahead = False
            copy.started_at = self.now
            copy.progress = None
            copy.lease = Lease(copy, consumer, lease, self.now)
            self._set_alarm(copy)
            leases.append(copy.lease)
        return leases

    def settle(self, lease: Lease, outcome: Outcome) -> None:
        """Perform ``outcome`` on the copy of a living lease."""
        copy = lease.copy
        copy.lease = None
        if isinstance(outcome, Ack):
            copy.result = outcome.result
            self._end(copy, JobState.SUCCEEDED)
        elif isinstance(outcome, Dead):
            copy.failures.append(outcome.failure)
            self._end(copy, JobState.DEAD)
        elif isinstance(outcome, Cancel):
            self._end(copy, JobState.CANCELLED)
        elif isinstance(outcome, Retry):
            self._count(copy, outcome.failure, suspect=outcome.suspect)
            self._wait(copy, outcome.delay, ahead=False)
        elif isinstance(outcome, Release):
            self._wait(copy, outcome.delay, ahead=outcome.delay <= 0)
        self._set_alarm(copy)
        # Whoever waits has another alarm to wait for; and having settled a suspect one may take the next.
        copy.subscription.wake()

    def release(self, leases: Sequence[Lease]) -> None:
        """Give back, uncounted and at once, what a closing consumer holds."""
        for lease in leases:
            self.settle(lease, Release())

    def _recover(self, copy: Copy, lease: Lease) -> None:
        """The lease is over: its holder has died or is frozen, and what it says from now on is refused."""
        copy.lease = None
        if lease.started:
            self._count(copy, self._worker_lost(copy), suspect=True)
        self._wait(copy, 0.0, ahead=True)

    def _worker_lost(self, copy: Copy) -> Failure:
        return Failure(
            attempt=copy.attempt,
            reason="worker_lost",
            message="the lease ended while the handler ran: its worker died or was frozen",
            started_at=copy.started_at,
            failed_at=self.now,
        )

    def _count(self, copy: Copy, failure: Failure, *, suspect: bool) -> None:
        copy.failures.append(failure)
        copy.counted += 1
        copy.suspect = suspect

    def _wait(self, copy: Copy, delay: float, *, ahead: bool) -> None:
        if copy.cancel_requested:
            self._end(copy, JobState.CANCELLED)
            return
        copy.visible_at = self.now + max(0.0, delay)
        copy.ready_since = copy.ready_since if ahead else copy.visible_at
        copy.ahead = ahead
        self._look_at(copy)

    def _end(self, copy: Copy, end: JobState) -> None:
        copy.subscription.leave(copy, self.now)
        copy.finish(end, self.now, None if end is JobState.DEAD else copy.message.result_ttl)
        if end is JobState.DEAD:
            copy.death = next(self._deaths)
            copy.subscription.dead[copy.message.id] = copy
        elif copy.message.result_ttl <= 0:
            self._forget(copy)

    def _forget(self, copy: Copy) -> None:
        state, message_id = copy.subscription, copy.message.id
        state.copies.pop(message_id, None)
        state.dead.pop(message_id, None)
        siblings = self.by_id[message_id]
        del siblings[state.name]
        if not siblings:
            del self.by_id[message_id]
            self._dedup.release(copy.message)
        copy.forget_at = None
        copy.end = copy.end or JobState.CANCELLED
        copy.lease = None
        self.alarms.set(copy, None)

    # Operators

    def redrive(self, state: SubscriptionState, ids: Sequence[str]) -> list[str]:
        moved = []
        for copy in self._dead(state, ids):
            del state.dead[copy.message.id]
            copy.begin_anew(copy.message, self.now)
            # Whoever redrives wants it handled: an expiry that passed meanwhile would drop it.
            copy.expires_at = None
            copy.redriven += 1
            self._enter(copy)
            moved.append(copy.message.id)
        return moved

    def discard(self, state: SubscriptionState, ids: Sequence[str]) -> list[str]:
        copies = list(self._dead(state, ids))
        for copy in copies:
            self._forget(copy)
        return [copy.message.id for copy in copies]

    def purge(self, state: SubscriptionState) -> int:
        waiting = state.waiting()
        for copy in waiting:
            # The record stays: an id that was given out must not become unknown before its time.
            self._cancel(copy)
        return len(waiting)

    def cancel(self, copies: Sequence[Copy]) -> CancelAnswer:
        if not copies:
            return "unknown"
        answers: set[CancelAnswer] = {self._cancel(copy) for copy in copies}
        strongest: tuple[CancelAnswer, ...] = ("requested", "cancelled", "finished")
        return next(answer for answer in strongest if answer in answers)

    def _cancel(self, copy: Copy) -> CancelAnswer:
        if copy.end is not None:
            return "finished"
        if copy.lease is not None:
            copy.cancel_requested = True
            return "requested"
        self._end(copy, JobState.CANCELLED)
        self._set_alarm(copy)
        return "cancelled"

    def _dead(self, state: SubscriptionState, ids: Sequence[str]) -> Iterator[Copy]:
        return (state.dead[message_id] for message_id in dict.fromkeys(ids) if message_id in state.dead)


def delivery_of(lease: Lease) -> Delivery:
    copy = lease.copy
    return Delivery(
        message=copy.message,
        subscription=copy.subscription.name,
        attempt=copy.attempt,
        suspect=copy.suspect,
        replayed=copy.replayed,
        receipt=lease,
    )


def _is_over(message: Message, now: float) -> bool:
    return message.expires_at is not None and message.expires_at <= now
