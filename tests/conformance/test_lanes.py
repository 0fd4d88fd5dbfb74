"""The conformance suite on a broker without priorities, with lanes beside its queues."""

from __future__ import annotations

from typing import ClassVar
from uuid import uuid4

import msgspec
import pytest

from postroom.broker.base import PRIORITIES, Broker, Capabilities
from postroom.broker.lanes import LanedBroker
from postroom.broker.memory import MemoryBroker
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness


class Level(MemoryBroker):
    """Hands out what is ready in the order of time, whatever its priority; keeps no jobs."""

    capabilities: ClassVar[Capabilities] = msgspec.structs.replace(
        MemoryBroker.capabilities, priorities=frozenset(), jobs=False, transactional_publish=False
    )


class LanedHarness(Harness):
    def __init__(self) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"

    def make_broker(self) -> Broker:
        return LanedBroker(Level(self._url, clock=self.clock), PRIORITIES, clock=self.clock)


@pytest.fixture
def harness() -> Harness:
    return LanedHarness()
