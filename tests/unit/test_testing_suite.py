"""On a real clock a test of the suite that fails says nothing if the machine was too slow for its units."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import uuid4

import pytest

from postroom.broker.memory import MemoryBroker
from postroom.errors import PostroomError
from postroom.message import Message
from postroom.testing.harness import Harness
from postroom.testing.scene import Scene
from postroom.testing.suite import SUITE, proves


class Slow(MemoryBroker):
    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        await asyncio.sleep(0.05)
        return await super().publish(messages)


class RealTime(Harness):
    def __init__(self, broker: type[MemoryBroker], unit: float) -> None:
        self._broker, self._url = broker, f"memory://{uuid4().hex}"
        self.unit = unit

    def make_broker(self) -> MemoryBroker:
        return self._broker(self._url)


def units_tried(broker: type[MemoryBroker], unit: float, *, enough: float) -> list[float]:
    """Those of a scenario that fails unless its unit is ``enough``."""
    tried: list[float] = []

    async def test_scenario(scene: Scene) -> None:
        tried.append(scene.unit)
        await scene.publish(scene.message(await scene.queue()))
        assert scene.unit >= enough

    run = proves("C0")(test_scenario)
    del SUITE["test_testing_suite.test_scenario"]
    if enough <= 4 * unit:
        run(RealTime(broker, unit))
    else:
        with pytest.raises(AssertionError):
            run(RealTime(broker, unit))
    return tried


def test_a_slow_step_makes_a_failure_void() -> None:
    assert units_tried(Slow, 0.1, enough=0.2) == [0.1, 0.2]


def test_but_twice_at_most() -> None:
    assert units_tried(Slow, 0.08, enough=1.0) == [0.08, 0.16, 0.32]


def test_where_all_steps_were_quick_a_failure_counts() -> None:
    assert units_tried(MemoryBroker, 30.0, enough=1000.0) == [30.0]
