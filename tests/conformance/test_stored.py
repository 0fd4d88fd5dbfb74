"""The conformance suite on a broker that keeps no status, with a store beside it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import msgspec
import pytest

from postroom.broker.base import Broker, Capabilities
from postroom.broker.memory import MemoryBroker
from postroom.store.beside import StoredBroker
from postroom.store.sqlite import SQLiteStore
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness


class Poor(MemoryBroker):
    """Keeps neither status nor keys, as far as it tells; it forgets each message at its end."""

    capabilities: ClassVar[Capabilities] = msgspec.structs.replace(
        MemoryBroker.capabilities, jobs=False, deduplication=False, known_ids=False, transactional_publish=False
    )


class StoredHarness(Harness):
    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"
        self._store = f"sqlite:///{folder}/store.db"

    def make_broker(self) -> Broker:
        return StoredBroker(
            Poor(self._url, clock=self.clock), SQLiteStore(self._store, clock=self.clock), clock=self.clock
        )


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return StoredHarness(tmp_path)
