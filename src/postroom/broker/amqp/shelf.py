"""What is held for long is held elsewhere.

A server takes back what is not settled within its ``consumer_timeout``, half an hour unless set, and ends the channel
that held it, with all its other messages. So whatever runs for longer is moved, every now and then, to a new copy in a
queue of this consumer's own, from which only this consumer takes. If the consumer dies, its copies become free there,
expire, and the server moves them to where they came from, at least once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any
from uuid import uuid4

from postroom.broker.amqp import wire
from postroom.broker.amqp.held import Held, ack
from postroom.broker.amqp.office import Office
from postroom.broker.amqp.subscriber import Subscriber

HOLD = 240.0
"""Seconds for which a message is held at one place: less than the shortest ``consumer_timeout`` that RabbitMQ
recommends, five minutes (rabbitmq.com/docs/consumers, "Acknowledgement timeout")."""

_YOUNG = 2.0
"""Seconds after which a queue survives the death of its server: RabbitMQ 3.10 writes its name only then."""
_ARRIVAL = 5.0
"""Seconds within which a copy put there comes to us."""
_PAUSE = 10.0
"""Seconds before another try, if something was not moved."""


class Shelf:
    """Of one consumer. Its queue is made when first needed; it tells ``lost()`` when it has lost what it held."""

    def __init__(self, office: Office, subscription: str, lost: Callable[[], object]) -> None:
        self._office = office
        self._subscription = subscription
        self._lost = lost
        self._name = uuid4().hex[:12]
        self._source: Subscriber | None = None
        self._moving: dict[str, asyncio.Future[int]] = {}
        self._is_busy = False
        self._next_try = 0.0

    @property
    def holding(self) -> int:
        """How many messages it holds."""
        return 0 if self._source is None else self._source.unsettled

    def wanted_for(self, leased: Collection[Held], now: float) -> list[Held]:
        """Which of these are to be moved now."""
        if self._is_busy or now < self._next_try:
            return []
        old = [held for held in leased if now - held.since > HOLD and not held.is_settling]
        # Copies are told apart by their ids: of two with the same one the second has its turn after the first.
        return list({held.copy.message.id: held for held in old}.values())

    async def move(self, wanted: Sequence[Held]) -> None:
        """Hold these by new copies; those of which none came stay where they are, for another try."""
        self._is_busy = True
        loop = asyncio.get_running_loop()
        self._next_try = loop.time() + _PAUSE
        try:
            source = await self._opened()
            source.ask(source.unsettled + len(wanted))
            # A copy that nobody takes from the start would expire while its original is still held.
            await source.barrier()
            self._moving = {held.copy.message.id: loop.create_future() for held in wanted}
            copies = [held.copy.released() for held in wanted]
            answers = await self._office.put_on_shelf(self._subscription, self._name, copies)
            if "stored" in answers:
                await asyncio.wait(self._moving.values(), timeout=_ARRIVAL)
            arrived = [held for held in wanted if self._moving[held.copy.message.id].done()]
            for held in arrived:
                self._change(held, source, self._moving[held.copy.message.id].result())
            if len(arrived) == len(wanted):
                self._next_try = 0.0
        finally:
            self._moving = {}
            self._is_busy = False

    def _change(self, held: Held, source: Subscriber, tag: int) -> None:
        if held.is_settling or not held.is_ours:
            # It has ended meanwhile, or is about to: so has its copy.
            source.ack([tag])
            return
        ack([held])
        held.source, held.tag, held.since = source, tag, asyncio.get_running_loop().time()

    def _arrived(
        self, _: str, tag: int, is_again: bool, exchange: str, routing_key: str, properties: Any, body: bytes
    ) -> None:
        assert self._source is not None
        copy = wire.read(properties, body, lambda: self._office.topic_of(exchange, routing_key), is_again=is_again)
        future = self._moving.get(copy.message.id)
        if copy.deaths:
            # We have held it before, and lost it: now it is a message like any other.
            self._source.give_up(tag)
        elif future is None or future.done():
            # It came too late to count on: its original has gone on holding the message.
            self._source.ack([tag])
        else:
            future.set_result(tag)

    async def _opened(self) -> Subscriber:
        if self._source is None or not self._source.is_alive:
            self._source = await self._office.open_shelf(self._subscription, self._name, self._arrived, self._lost)
            await asyncio.sleep(_YOUNG)
        return self._source

    async def close(self) -> None:
        """Of what is still held the server takes care, as if this process had died."""
        source = self._source
        if source is None or not source.is_alive:
            return
        await source.silence()
        await source.close()
        if not (source.unsettled or source.has_given_up):
            await self._office.remove_shelf(self._subscription, self._name)
