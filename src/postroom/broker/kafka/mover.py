"""What waits for its time is taken out of the way of others: copied to the end of the subscription's own topic."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from postroom.broker.kafka.backlog import Item, Part
from postroom.broker.kafka.ledger import ROOMY
from postroom.broker.kafka.sender import Sender
from postroom.broker.kafka.wire import Envelope, Record
from postroom.clock import Clock

_SOON = 2.0
"""Seconds: what is due sooner waits where it is."""


class Mover:
    """Of one subscription that is not ordered, in one process. Lives on the event loop."""

    def __init__(
        self, sender: Sender, clock: Clock, later: str,
        copy: Callable[[Envelope], Record], ended: Callable[[Sequence[Item], Sequence[Item]], None],
    ) -> None:  # fmt: skip
        """``ended(moved, kept)``: the copies of some are confirmed; the others are still to be done where they are."""
        self._sender = sender
        self._clock = clock
        self._later = later
        self._copy = copy
        self._ended = ended
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """A copy may be there already of what is not done yet."""
        return bool(self._tasks)

    def arrived(self, items: Iterable[Item]) -> None:
        """Move those of them that wait for long, if they are not where they should be already."""
        soon = self._clock.now() + _SOON
        self._move(_that_fit(item for item in items if item.due > soon and item.part.topic != self._later))

    def make_room(self, part: Part) -> None:
        """Move what keeps others from being read, or what is done from being said briefly."""
        scattered = part.ledger.ranges > ROOMY
        if scattered or (part.paused and part.topic != self._later):
            soon, last = self._clock.now() + _SOON, part.ledger.last_done
            waiting = (item for item in part.items.values() if item.state == "waiting" and item.due > soon)
            self._move([item for item in waiting if item.offset < last] if scattered else _that_fit(waiting))

    async def close(self, timeout: float) -> None:
        """Give what is under way some seconds to end."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout)
            for task in late:
                task.cancel()

    def _move(self, items: Iterable[Item]) -> None:
        moving = list(items)
        for item in moving:
            item.state = "out"
        if moving:
            task = asyncio.get_running_loop().create_task(self._moved(moving))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _moved(self, items: list[Item]) -> None:
        """The copy is confirmed before the original is done."""
        copies = [self._copy(item.told(self._clock.now(), due=item.due)) for item in items]
        errors = await self._sender.send(copies)
        pairs = list(zip(items, errors, strict=True))
        self._ended(
            [item for item, error in pairs if error is None], [item for item, error in pairs if error is not None]
        )


def _that_fit(items: Iterable[Item]) -> Iterator[Item]:
    """Which can be moved now: each stretch of them is a range of what is done, until those around it are done too."""
    stretches: Counter[Part] = Counter()
    last: Item | None = None
    for item in items:
        if last is None or last.part is not item.part or last.offset + 1 != item.offset:
            stretches[item.part] += 1
        if item.part.ledger.ranges + stretches[item.part] <= ROOMY:
            last = item
            yield item
