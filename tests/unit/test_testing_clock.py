"""The clock that stands still."""

from __future__ import annotations

import asyncio

import pytest

from postroom.testing.clock import ManualClock


def test_sleepers_wake_in_the_order_of_time_each_at_theirs() -> None:
    async def main() -> None:
        clock = ManualClock(start=100.0)
        woken: list[tuple[str, float]] = []

        async def sleep(name: str, *pauses: float) -> None:
            for pause in pauses:
                assert not await clock.wait(asyncio.Event(), pause)
                woken.append((name, clock.now()))

        tasks = [asyncio.create_task(sleep("late", 5.0)), asyncio.create_task(sleep("often", 2.0, 2.0, 2.0))]
        await clock.advance(4.9)
        assert woken == [("often", 102.0), ("often", 104.0)]
        await clock.advance(1.1)
        assert woken[2:] == [("late", 105.0), ("often", 106.0)]
        assert clock.now() == 106.0
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_an_event_ends_the_wait_without_time() -> None:
    async def main() -> None:
        clock = ManualClock()
        for timeout in (None, 60.0):
            event = asyncio.Event()
            task = asyncio.create_task(clock.wait(event, timeout))
            await clock.settle()
            assert not task.done()
            event.set()
            assert await task
            assert await clock.wait(event, 0.0)
        assert not await clock.wait(asyncio.Event(), 0.0)

    asyncio.run(main())


def test_it_never_goes_back() -> None:
    with pytest.raises(ValueError, match="negative"):
        asyncio.run(ManualClock().advance(-1.0))
