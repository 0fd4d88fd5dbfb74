"""The conformance suite on the memory broker."""

from __future__ import annotations

from uuid import uuid4

import pytest

from postroom.broker.memory import MemoryBroker
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness


class MemoryHarness(Harness):
    def __init__(self) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"

    def make_broker(self) -> MemoryBroker:
        return MemoryBroker(self._url, clock=self.clock)


@pytest.fixture
def harness() -> Harness:
    return MemoryHarness()
