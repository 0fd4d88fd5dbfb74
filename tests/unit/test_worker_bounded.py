"""A worker beside a broker that hands out messages, but takes no outcome back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

from postroom import App, BrokerUnavailable
from postroom.broker.base import Broker, Delivery, Outcome
from postroom.broker.memory import MemoryBroker
from postroom.errors import SettlementError
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer
from postroom.worker.fetch import MAX_PREFETCH
from tests.conftest import wait_until, working

CONCURRENCY = 5


class Refusing(DefectiveConsumer):
    """As long as it is shut, every settle fails."""

    shut = True
    taken = 0

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        deliveries = await super().receive(max_messages, timeout)
        Refusing.taken += len(deliveries)
        return deliveries

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        if Refusing.shut:
            raise BrokerUnavailable("not allowed to delete")
        return await super().settle(settlements)


class RefusingBroker(DefectiveBroker):
    consumer_class = Refusing


class RefusingApp(App):
    def make_broker(self) -> Broker:
        return RefusingBroker(MemoryBroker(self.url))


def test_it_holds_no_more_than_it_can_give_back() -> None:
    """C15: and it goes on, with nothing lost, as soon as it can."""
    app = RefusingApp(f"memory://{uuid4().hex}")
    ran: list[int] = []

    @app.task(queue="a")
    async def work(number: int) -> None:
        ran.append(number)

    count = 4 * MAX_PREFETCH
    with app:
        work.enqueue_many(work.call(number) for number in range(count))
        with working(app, concurrency=CONCURRENCY):
            # Long enough for it to take everything, were there no bound.
            held, since = 0, time.monotonic()
            while time.monotonic() - since < 2.0:
                if held != Refusing.taken:
                    held, since = Refusing.taken, time.monotonic()
                time.sleep(0.02)
            assert CONCURRENCY <= held <= 2 * (CONCURRENCY + MAX_PREFETCH) < count
            Refusing.shut = False
            wait_until(lambda: len(ran) >= count, "all have run", 30.0)
    assert sorted(ran) == list(range(count))
