"""What is held for long is held elsewhere.

A server takes back what is not settled within its ``consumer_timeout``, half an hour unless set, and ends the channel
that held it, with all its other messages. So whatever runs for longer is moved, every now and then, to a new copy in a
queue of this consumer's own, from which only this consumer takes. If the consumer dies, its copies become free there,
expire, and the server moves them to where they came from, at least once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from postroom.broker.amqp.held import Held
from postroom.broker.amqp.office import Office
from postroom.broker.amqp.subscriber import Subscriber

HOLD = 600.0
"""Seconds for which a message is held at one place."""

_ARRIVAL = 5.0
"""Seconds within which a copy put there comes to us: less than it may lie there."""


class Shelf:
    """Made when first needed; ends with its channel, of which it tells ``lost()``."""

    def __init__(self, office: Office, subscription: str, source: Subscriber, name: str) -> None:
        self._office = office
        self._subscription = subscription
        self._name = name
        self._moving: dict[str, asyncio.Future[int]] = {}
        self.source = source

    @classmethod
    async def make(cls, office: Office, subscription: str, lost: Any) -> Shelf:
        name = uuid4().hex[:12]
        shelf: list[Shelf] = []
        source = await office.open_shelf(subscription, name, lambda *delivery: shelf[0]._arrived(*delivery), lost)
        shelf.append(cls(office, subscription, source, name))
        return shelf[0]

    async def move(self, held: Sequence[Held]) -> None:
        """Hold these by new copies; those of which none came stay where they are."""
        loop = asyncio.get_running_loop()
        self.source.ask(self.source.unsettled + len(held))
        copies = [one.copy.released() for one in held]
        waiting = [self._moving.setdefault(copy.message.id, loop.create_future()) for copy in copies]
        answers = await self._office.put_on_shelf(self._subscription, self._name, copies)
        stored = [future for future, answer in zip(waiting, answers, strict=True) if answer == "stored"]
        if stored:
            await asyncio.wait(stored, timeout=_ARRIVAL)
        for one, future in zip(held, waiting, strict=True):
            self._moving.pop(one.copy.message.id, None)
            if future.done():
                self._change(one, future.result())

    def _change(self, held: Held, tag: int) -> None:
        if held.is_settled or held.is_settling or not held.source.is_alive:
            # It has ended meanwhile: so has its copy.
            self.source.ack([tag])
            return
        held.source.ack([held.tag])
        held.source, held.tag, held.since = self.source, tag, asyncio.get_running_loop().time()

    def _arrived(self, _: str, tag: int, exchange: str, routing_key: str, properties: Any, body: bytes) -> None:
        future = self._moving.get(properties.message_id or "")
        if future is None or future.done():
            # It came too late to count on: the original goes on holding the message.
            self.source.ack([tag])
        else:
            future.set_result(tag)

    async def close(self) -> None:
        await self._office.close_shelf(self._subscription, self._name)
        await self.source.close()
