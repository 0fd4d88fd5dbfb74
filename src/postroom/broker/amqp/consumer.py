"""The consumer of a subscription without order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from postroom.broker.amqp import outcomes, wire
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.held import Held, ack, line_up
from postroom.broker.amqp.office import Office
from postroom.broker.amqp.shelf import Shelf
from postroom.broker.amqp.subscriber import Subscriber
from postroom.broker.base import Consumer, Delivery, Outcome
from postroom.broker.refusals import check_count, consumer_closed, lease_over, settled_before
from postroom.errors import BrokerUnavailable, SettlementError
from postroom.message import new_id

logger = logging.getLogger("postroom.broker.amqp")

_TEND = 0.05
"""Seconds between two looks at leases and at what nobody takes."""
_LINGER = 0.25
"""Seconds without a ``receive`` after which all that was not taken is given back."""
_SUSPECT_WAIT = 0.3
"""Seconds a suspect waits here for its turn; then another consumer may have it."""
_SUSPECTS = 4
"""So many suspects wait here for their turn."""
_SUSPECT_TIME = 0.02
"""Seconds a suspect takes, roughly."""


class AMQPConsumer(Consumer):
    """See :class:`postroom.broker.base.Consumer`.

    The server leases for as long as the connection lives. So the lease is a timer here: what is not extended in time
    is given back. A process that is frozen as a whole does not answer heartbeats, and loses the connection.
    """

    def __init__(self, office: Office, name: str, lease: float, closed: Callable[[AMQPConsumer], None]) -> None:
        self._office = office
        self._name = name
        self._lease = lease
        self._on_close = closed
        self._loop = asyncio.get_running_loop()
        self._source: Subscriber | None = None
        self._opening = asyncio.Lock()
        self._buffer: deque[Held] = deque()
        self._suspects: deque[Held] = deque()
        self._leased: set[Held] = set()
        self._receiving = 0
        self._settling = 0
        self._idle_since = 0.0
        self._wake = asyncio.Event()
        self._shelf = Shelf(office, name, self._lost)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._closing: asyncio.Task[None] | None = None

    # What the broker counts

    @property
    def waiting(self) -> int:
        """Handed over by the server, but not yet to anybody."""
        return len(self._buffer) + len(self._suspects)

    @property
    def delayed(self) -> int:
        """Handed over by the server, and waiting behind a key or for its time."""
        return 0

    @property
    def running(self) -> int:
        return len(self._leased)

    @property
    def name(self) -> str:
        return self._name

    def purge(self) -> int:
        """Delete what waits here. Returns how many."""
        ack(waiting := self._untaken())
        return len(waiting)

    # The contract

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        deadline = None if timeout is None else self._loop.time() + timeout
        self._receiving += 1
        try:
            while True:
                source = await self._opened()
                found = self._take(max_messages)
                if found:
                    await self._hand_out(found)
                    return found
                left = None if deadline is None else deadline - self._loop.time()
                if left is None or left > 0 or not source.is_asking:
                    # Also if there is no time left: who only ever looks in would find nothing.
                    source.ask(self._demand(max_messages))
                if left is not None and left <= 0:
                    return []
                self._wake.clear()
                await self._office.clock.wait(self._wake, left)
                if not (source.is_alive or source.is_deleted or self._closed or source is not self._source):
                    reason = source.reason
                    raise BrokerUnavailable(f"{self._name}: the connection was lost ({reason}); receive again")
        finally:
            self._receiving -= 1
            self._idle_since = self._loop.time()

    def started(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            delivery.receipt.started = True

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        if self._closed:
            raise consumer_closed(self._name)
        answers: list[SettlementError | None] = []
        now = self._loop.time()
        chosen: dict[int, tuple[Held, Outcome]] = {}
        for index, (delivery, outcome) in enumerate(settlements):
            held: Held = delivery.receipt
            answers.append(self._refusal(held, delivery, now))
            if answers[index] is None:
                # Until it is done, the same delivery later in the batch is a second settlement.
                held.is_settling = True
                chosen[index] = (held, outcome)
        self._settling += 1
        try:
            for index, error in (await self._perform(chosen)).items():
                answers[index] = error
        finally:
            self._settling -= 1
            for held, _ in chosen.values():
                held.is_settling = False
        return answers

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        if self._closed:
            raise consumer_closed(self._name)
        until = self._loop.time() + self._lease
        lost = []
        for delivery in deliveries:
            held: Held = delivery.receipt
            if (held.is_settling or held in self._leased) and held.source.is_alive:
                held.until = until
            else:
                lost.append(delivery)
        return lost

    async def close(self) -> None:
        self._closed = True
        self._wake.set()
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        # Whoever comes second waits too: after it the connection may go, and with it what is not given back yet.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            try:
                await self._release_all()
            finally:
                if self._tasks:
                    await asyncio.wait(self._tasks)
                while self._settling:  # noqa: ASYNC110 -- told by no event
                    await asyncio.sleep(_TEND)
                await self._shelf.close()
                # Whatever could not be stored: while its channel is open nobody else gets what it holds.
                if self._source is not None and self._source.is_alive:
                    await self._source.close()
        except BrokerUnavailable as error:
            logger.warning("%s: the server gives back what was held, and counts it: %s", self._name, error)
        if self._timer is not None:
            self._timer.cancel()
        self._on_close(self)

    async def _release_all(self) -> None:
        if self._source is not None and self._source.is_alive:
            await self._source.silence()
        self._release([*self._untaken(), *(held for held in self._leased if not held.is_settling)])

    # Receiving

    def _demand(self, max_messages: int) -> int:
        """How many messages the server should let be unsettled."""
        # Of suspects more wait here only while they cannot be given back: then no more are asked for.
        waiting = len(self._buffer) + min(len(self._suspects), _SUSPECTS)
        return len(self._leased) - self._shelf.holding + waiting + max_messages

    async def _hand_out(self, deliveries: Sequence[Delivery]) -> None:
        """What must have happened before these leave."""

    async def _opened(self) -> Subscriber:
        async with self._opening:
            if self._closed:
                raise consumer_closed(self._name)
            if self._source is None or not self._source.is_alive:
                self._forget()
                if self._source is not None:
                    # Its queue may be gone, and the channel still be there.
                    await self._source.close()
                self._source = await self._subscribe()
                self._tend()
            return self._source

    async def _subscribe(self) -> Subscriber:
        return await self._office.subscribe(self._name, self._arrived, self._lost)

    def _forget(self) -> None:
        """The server has given to others what was held by a channel that is lost."""
        self._buffer = deque(held for held in self._buffer if held.is_ours)
        self._suspects = deque(held for held in self._suspects if held.is_ours)
        self._leased = {held for held in self._leased if held.is_ours}

    def _lost(self) -> None:
        self._forget()
        self._wake.set()

    def _arrived(
        self, _: str, tag: int, is_again: bool, exchange: str, routing_key: str, properties: Any, body: bytes
    ) -> None:
        source = self._source
        assert source is not None
        copy = wire.read(properties, body, lambda: self._office.topic_of(exchange, routing_key), is_again=is_again)
        now = self._office.clock.now()
        held = Held(copy, source, tag, self._loop.time())
        if copy.message.expires_at is not None and copy.message.expires_at <= now:
            ack([held])
        elif self._sets_aside(held):
            pass
        elif copy.due is not None and copy.due > now:
            self._give_back([(held, copy.released(copy.due), copy.due - now)])
        else:
            line_up(held, self._suspects if copy.is_suspect else self._buffer)
            self._wake.set()
            if len(self._suspects) == _SUSPECTS + 1:
                # Many come at once, when a worker has died: look when all that was read with it is here.
                self._loop.call_soon(self._turn_away)

    def _sets_aside(self, held: Held) -> bool:
        """A message that cannot be handed out as it came: another client's, or one that would overtake."""
        if held.copy.oversized:
            held.source.bury(held.tag)
        elif held.copy.nameless:
            # Whatever becomes of it, it must be known by one id: it is stored again with one.
            self._give_back([(held, wire.named(held.copy, new_id()).released(), 0.0)])
        elif held.copy.message.priority and held.copy.deaths:
            # What a queue takes back it hands out before all others; stored again, it has the place of its priority.
            self._give_back([(held, held.copy.released(), 0.0)])
        else:
            return False
        return True

    def _take(self, count: int) -> list[Delivery]:
        taken: list[Held] = []
        if self._suspects and self._suspect_is_next() and not any(held.copy.is_suspect for held in self._leased):
            taken.append(self._suspects.popleft())
        while self._buffer and len(taken) < count:
            taken.append(self._buffer.popleft())
        until = self._loop.time() + self._lease
        for held in taken:
            held.until = until
        self._leased.update(taken)
        return [self._delivery(held) for held in taken]

    def _suspect_is_next(self) -> bool:
        return not self._buffer or self._buffer[0].copy.message.priority <= self._suspects[0].copy.message.priority

    def _delivery(self, held: Held) -> Delivery:
        copy = held.copy
        return Delivery(
            message=copy.message,
            subscription=self._name,
            attempt=copy.attempt,
            suspect=copy.is_suspect,
            replayed=copy.replayed,
            receipt=held,
        )

    # Settling

    def _refusal(self, held: Held, delivery: Delivery, now: float) -> SettlementError | None:
        if held.is_settled or held.is_settling:
            return settled_before(delivery.message.id)
        if held not in self._leased or not held.source.is_alive or held.until <= now:
            return lease_over(delivery.message.id)
        return None

    async def _perform(self, chosen: outcomes.Chosen) -> dict[int, SettlementError]:
        """Store the copies, then let go of the originals. Returns the errors."""
        errors = await outcomes.store(self._office, self._name, chosen)
        done = [held for index, (held, _) in chosen.items() if index not in errors]
        errors |= {index: outcomes.lost(held) for index, (held, _) in chosen.items() if not held.source.is_alive}
        settled = [held for held in done if held.source.is_alive]
        if settled:
            self._leased.difference_update(settled)
            ack(settled)
            for source in {held.source for held in settled}:
                await source.barrier()
            for held in settled:
                held.is_settled = True
            if self._suspects:
                self._wake.set()
        return errors

    def _untaken(self) -> list[Held]:
        """Take out all that waits here."""
        waiting = [*self._buffer, *self._suspects]
        self._buffer.clear()
        self._suspects.clear()
        return waiting

    def _release(self, returned: Sequence[Held]) -> None:
        if returned:
            self._give_back([(held, held.copy.released(), 0.0) for held in returned])

    def _give_back(self, returned: Sequence[tuple[Held, Copy, float]]) -> None:
        """Store each as the given copy after so many seconds; the server need not count it."""
        self._leased.difference_update(held for held, _, _ in returned)
        self._start(self._store_again(returned))

    async def _store_again(self, returned: Sequence[tuple[Held, Copy, float]]) -> None:
        while self._office.is_blocked and not self._closed:  # noqa: ASYNC110 -- told by no event
            await asyncio.sleep(_TEND)
        await outcomes.give_back(self._office, self._name, returned)

    # Looking after

    def _tend(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        source = self._source
        is_open = source is not None and source.is_alive
        # What is on the shelf may outlive the channel that it came by.
        if self._closed or not (is_open or self._leased):
            return
        now = self._loop.time()
        self._end_leases(now)
        if source is not None and is_open:
            self._look_after(source, now)
        self._timer = self._loop.call_later(_TEND, self._tend)

    def _look_after(self, source: Subscriber, now: float) -> None:
        """Give back what nobody takes; not while no copy can be stored, as each would be charged with a death."""
        if self._office.is_blocked:
            return
        if self._receiving and source.asks_too_much and source.is_full:
            source.ask_nothing()
            self._wake.set()
        elif not self._receiving and now - self._idle_since > _LINGER and source.is_quiet:
            source.ask_nothing()
            self._release(self._untaken())
        if old := self._shelf.wanted_for(self._leased, now):
            self._start(self._shelf.move(old))
        late = [held for held in self._suspects if now - held.until > _SUSPECT_WAIT]
        if late:
            for held in late:
                self._suspects.remove(held)
            self._give_back([(held, held.copy.released(), _SUSPECT_WAIT) for held in late])

    def _turn_away(self) -> None:
        """Give back the suspects for whose turn it is too early, each for as long as those before it may take.

        What is held here is charged if this process dies: a crowd that waits behind a killer would die with it.
        """
        early = (
            [] if self._office.is_blocked else [self._suspects.pop() for _ in range(len(self._suspects) - _SUSPECTS)]
        )
        if early:
            waits = [_SUSPECT_WAIT + place * _SUSPECT_TIME for place in reversed(range(len(early)))]
            self._give_back([(held, held.copy.released(), wait) for held, wait in zip(early, waits, strict=True)])

    def _end_leases(self, now: float) -> None:
        over = [held for held in self._leased if held.until <= now and not held.is_settling]
        for held in over:
            self._leased.discard(held)
            if held.started:
                # The server counts it as one more death: just what it is.
                held.source.give_up(held.tag)
        self._release([held for held in over if not held.started])
        if over:
            self._wake.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: %s", self._name, error)
