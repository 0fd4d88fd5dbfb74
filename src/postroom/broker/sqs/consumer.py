"""The consumer: polls ahead of its user, keeps its own time of leases, and settles in batches."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from postroom.broker.base import Consumer, Delivery, Outcome, Release
from postroom.broker.refusals import check_count, consumer_closed, lease_over, of_another_consumer, settled_before
from postroom.broker.sqs.held import Held, Memory, receive
from postroom.broker.sqs.kept import Kept
from postroom.broker.sqs.outcomes import Outcomes
from postroom.broker.sqs.service import Answers, Missing, Service, not_found, passing
from postroom.broker.sqs.wire import UNFILTERED
from postroom.clock import Clock
from postroom.errors import BrokerUnavailable, PostroomError, SettlementError

logger = logging.getLogger("postroom.broker.sqs")

_FULL = 10
"""Messages of one ReceiveMessage, at most."""
_POLLS = 8
"""Requests for messages that are under way at once."""
_PARKED = 3
"""Suspects of an ordered queue that wait here, as they cannot be given back uncounted; then no more is asked for."""
_UNWANTED = 0.5
"""Seconds for which a message that came too late for its receive waits here for the next; of an ordered queue half the
lease, as others count what is given back."""


class _Poll(NamedTuple):
    wanted: int
    wait: int


class SQSConsumer(Consumer):
    """See :class:`postroom.broker.base.Consumer`.

    A request for messages is never cancelled: what the service hands to a connection that is gone is lost for a
    whole lease. So polls run on their own, and what they bring waits here, for a moment, to be received.
    """

    def __init__(
        self,
        service: Service,
        kept: Kept,
        lease: float,
        *,
        clock: Clock,
        memory: Memory,
        closed: Callable[[SQSConsumer], None],
    ) -> None:
        self._service = service
        self._kept = kept
        self._lease = lease
        self._visibility = math.ceil(lease)
        # As the lease counts from the question, what comes late in a long poll would have little of it left.
        self._wait = min(service.address.wait, max(1, int(lease / 3)))
        # Ours ends first, so that what is sent just in time also arrives in time.
        self._own_lease = lease - min(0.5, lease / 20)
        self._clock = clock
        self._memory = memory
        self._outcomes = Outcomes(service, kept, clock=clock, memory=memory)
        self._on_close = closed
        self._ready: deque[Held] = deque()
        self._suspects: deque[Held] = deque()
        self._here: dict[str, Held] = {}
        """By the service's id: what waits here, and what was handed out and is not settled."""
        self._suspect: Held | None = None
        self._polls: dict[asyncio.Task[None], _Poll] = {}
        self._width = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._receiving = 0
        self._arrived = asyncio.Event()
        self._error: PostroomError | None = None
        self._has_heard = False
        """The service has answered a request for messages."""
        self._closed = False

    @property
    def _ordered(self) -> bool:
        return self._kept.declared.ordered

    # In

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        self._receiving += 1
        try:
            if timeout is not None and timeout < 1:
                return await self._glance(max_messages, timeout)
            return await self._watch(max_messages, math.inf if timeout is None else time.monotonic() + timeout)
        finally:
            self._receiving -= 1
            self._expect_a_receive()

    async def _watch(self, count: int, deadline: float) -> list[Delivery]:
        while True:
            self._arrived.clear()
            deliveries = self._hand_over(count)
            left = deadline - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            # It may outlast this call: what it brings waits for the next.
            self._ask(count, self._wait)
            await self._clock.wait(self._arrived, None if left == math.inf else left)

    async def _glance(self, count: int, timeout: float) -> list[Delivery]:
        """Look now and at the end: the service waits whole seconds only."""
        deliveries = await self._look(count)
        if not deliveries and timeout > 0:
            await self._clock.wait(self._arrived, timeout)
            deliveries = await self._look(count)
        return deliveries

    async def _look(self, count: int) -> list[Delivery]:
        deliveries = self._hand_over(count)
        if not deliveries:
            self._arrived.clear()
            self._ask(count, 0)
            # Polls that wait have told long ago what was there.
            if any(poll.wait == 0 for poll in self._polls.values()):
                await self._arrived.wait()
            deliveries = self._hand_over(count)
            self._arrived.clear()
        return deliveries

    def started(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing to note: every receive that nobody accounts for counts."""

    def _hand_over(self, count: int) -> list[Delivery]:
        self._check_open()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        chosen: list[Held] = []
        if self._suspects and not (self._suspect is not None and self._suspect.alive):
            self._suspect = self._suspects.popleft()
            chosen.append(self._suspect)
        while self._ready and len(chosen) < count:
            chosen.append(self._ready.popleft())
        # Of those whose lease is over already somebody else will hear.
        for held in chosen:
            if not held.alive:
                self._drop(held)
        return [held.delivery(self._kept.name) for held in chosen if held.alive]

    def _ask(self, wanted: int, wait: int) -> None:
        """Have so many requests under way as what is wanted needs; more than one only where there is much."""
        if self._ordered and len(self._suspects) >= _PARKED:
            return
        size = 1 if self._ordered else _FULL
        while len(self._polls) < self._width:
            missing = wanted - len(self._ready) - sum(poll.wanted for poll in self._polls.values())
            if missing <= 0:
                return
            count = min(size, missing)
            task = asyncio.get_running_loop().create_task(self._poll(count, wait))
            self._polls[task] = _Poll(count, wait)

    async def _poll(self, count: int, wait: int) -> None:
        asked = time.monotonic()
        try:
            answer = await self._service.call(
                "sqs",
                "receive_message",
                QueueUrl=self._kept.url,
                # Of an ordered queue one: the next of the same key would only wait here, and count as received.
                MaxNumberOfMessages=count,
                WaitTimeSeconds=wait,
                VisibilityTimeout=self._visibility,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            )
            self._has_heard = True
            messages = answer.get("Messages", [])
            self._width = min(_POLLS, self._width * 2) if len(messages) >= count else max(1, self._width // 2)
            await self._admit(messages, asked)
            if self._ordered and self._suspects:
                self._width = 1
            if not messages:
                # Whatever answers before its time does so again, as often as it is asked.
                await asyncio.sleep(min(1.0, asked + wait - time.monotonic()))
        except Missing:
            self._error = not_found(self._kept.name)
        except PostroomError as error:
            self._error = passing(error) if self._has_heard else error
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._polls[task]
            self._arrived.set()
            self._expect_a_receive()

    async def _admit(self, messages: Sequence[dict[str, Any]], asked: float) -> None:
        now = self._clock.now()
        over: list[Held] = []
        early: list[Held] = []
        for raw in messages:
            held = receive(raw, self._kept, self, self._memory, now)
            # From the question, not the answer: this process may have been frozen between the two.
            held.taken, held.until = asked, asked + self._own_lease
            twin = self._here.get(held.identity)
            if twin is not None and twin.alive:
                # At least once: the service gave it again though it is hidden. The later receipt is the valid one.
                twin.receipt, twin.until = held.receipt, held.until
                continue
            envelope = held.copy.envelope
            if ((envelope.expires_at or math.inf) <= now and not envelope.everlasting) or not self._wants(raw, held):
                over.append(held)
            elif envelope.due is not None and envelope.due > now:
                early.append(held)
            else:
                self._here[held.identity] = held
                self._park(held) if held.suspect else self._ready.append(held)
        if over:
            await self._service.delete(self._kept.url, [held.receipt for held in over])
        if early:
            await self._hide_until_due(early, now)

    def _wants(self, raw: Mapping[str, Any], held: Held) -> bool:
        # SNS has compared the others; and a later filter does not concern what is here already.
        if UNFILTERED not in raw.get("MessageAttributes", {}):
            return True
        headers = held.copy.envelope.headers
        return all(headers.get(name) == value for name, value in self._kept.declared.where.items())

    def _park(self, held: Held) -> None:
        """A suspect waits here until the one before is settled, but not for so long that others could have had it."""
        if len(self._suspects) >= _FULL and not self._ordered:
            self._spawn(self._put_back([held], self._lease / 4))
            return
        self._suspects.append(held)
        asyncio.get_running_loop().call_later(self._lease / 2, self._put_off, held)

    def _put_off(self, held: Held) -> None:
        if held not in self._suspects:
            return
        if self._ordered and self._suspect is not None and self._suspect.alive:
            # Who gets it next would take what we give back for a death: soon it would have no attempt left.
            self._spawn(self._hold_on(held))
        else:
            self._suspects.remove(held)
            self._spawn(self._put_back([held], 1.0))

    async def _hold_on(self, held: Held) -> None:
        (answer,) = await self._prolong([held])
        if answer is None or (isinstance(answer, BrokerUnavailable) and held.alive):
            pause = self._lease / (2 if answer is None else 10)
            asyncio.get_running_loop().call_later(pause, self._put_off, held)
        elif held in self._suspects:
            self._suspects.remove(held)
            self._drop(held)

    async def _hide_until_due(self, early: Sequence[Held], now: float) -> None:
        if self._ordered:
            hidden = [(held, math.ceil((held.copy.envelope.due or now) - now)) for held in early]
            await self._service.hide(
                self._kept.url, [(held.receipt, min(held.longest(), delay)) for held, delay in hidden]
            )
        else:
            await self._outcomes.move([(held, held.copy.changed(suspect=held.suspect)) for held in early])

    # Out

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        self._check_open()
        answers: list[SettlementError | None] = [None] * len(settlements)
        accepted: list[tuple[int, Held, Outcome]] = []
        for number, (delivery, outcome) in enumerate(settlements):
            held: Held = delivery.receipt
            if held.unreported:
                held.unreported = False
                continue
            answers[number] = self._refusal(held, delivery.message.id)
            if answers[number] is None:
                held.settled = True
                accepted.append((number, held, outcome))
        results = await self._outcomes.perform([(held, outcome) for _, held, outcome in accepted])
        failed = next((result for result in results if isinstance(result, BrokerUnavailable)), None)
        for (number, held, _), result in zip(accepted, results, strict=True):
            if isinstance(result, BrokerUnavailable):
                held.settled = False
                continue
            self._drop(held)
            held.unreported = failed is not None and result is None
            if result is not None:
                answers[number] = result if isinstance(result, SettlementError) else SettlementError(str(result))
        if failed is not None:
            raise failed
        # Having settled a suspect one may take the next.
        self._arrived.set()
        return answers

    def _refusal(self, held: Held, message_id: str) -> SettlementError | None:
        if held.consumer is not self:
            return of_another_consumer(message_id)
        if held.settled:
            return settled_before(message_id)
        if not held.alive:
            self._drop(held)
            return lease_over(message_id)
        return None

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        lost: list[Delivery] = []
        asked: list[tuple[Delivery, Held]] = []
        for delivery in deliveries:
            held: Held = delivery.receipt
            if held.consumer is not self or not held.alive or held.longest() <= 0:
                lost.append(delivery)
            else:
                asked.append((delivery, held))
        answers = await self._prolong([held for _, held in asked])
        for (delivery, held), answer in zip(asked, answers, strict=True):
            if answer is not None and not isinstance(answer, BrokerUnavailable):
                held.until = 0.0
                lost.append(delivery)
        # Of what was lost unasked, too, nobody settles anything.
        now = time.monotonic()
        self._here = {identity: held for identity, held in self._here.items() if held.until > now}
        if answers and all(isinstance(answer, BrokerUnavailable) for answer in answers):
            assert answers[0] is not None
            raise answers[0]
        return lost

    async def _prolong(self, helds: Sequence[Held]) -> Answers:
        now = time.monotonic()
        asked = [(held.receipt, min(self._visibility, held.longest())) for held in helds]
        answers = await self._service.hide(self._kept.url, asked)
        for held, (_, seconds), answer in zip(helds, asked, answers, strict=True):
            if answer is None:
                held.until = now + min(self._own_lease, seconds)
        return answers

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        # What the polls under way bring would otherwise be lost for a lease, and count.
        await self._finish()
        # As a task: whoever closes once more, because the first lost patience, waits for it, too.
        self._spawn(self._put_back(list(self._here.values()), 0.0))
        await self._finish()
        self._ready.clear()
        self._suspects.clear()
        self._on_close(self)

    async def _finish(self) -> None:
        while self._polls or self._tasks:
            await asyncio.wait([*self._polls, *self._tasks])

    def _expect_a_receive(self) -> None:
        if (self._ready or self._suspects) and not self._receiving and not self._closed:
            newest = [*self._suspects, *self._ready][-1]
            patience = self._lease / 2 if self._ordered else _UNWANTED
            asyncio.get_running_loop().call_later(patience, self._expire, newest)

    def _expire(self, newest: Held) -> None:
        """Nobody received in between: give back all that is here."""
        unwanted = [*self._suspects, *self._ready]
        if not self._receiving and not self._closed and newest in unwanted:
            self._ready.clear()
            self._suspects.clear()
            self._spawn(self._put_back(unwanted, 0.0))

    async def _put_back(self, helds: Sequence[Held], delay: float) -> None:
        """Uncounted. What cannot be given back now comes back when its lease is over."""
        alive = [held for held in helds if held.alive]
        for held in alive:
            held.settled = True
            self._drop(held)
        try:
            answers = await self._outcomes.perform([(held, Release(delay)) for held in alive])
        except PostroomError as error:
            answers = [error] * len(alive)
        failed = [answer for answer in answers if answer is not None]
        if failed:
            logger.warning(
                "%s: %d messages could not be given back, they come again after their lease: %s",
                self._kept.name, len(failed), failed[0],
            )  # fmt: skip

    def _drop(self, held: Held) -> None:
        if self._here.get(held.identity) is held:
            del self._here[held.identity]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_open(self) -> None:
        if self._closed:
            raise consumer_closed(self._kept.name)
