"""The conformance suite on a broker that keeps no status, with a store beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import msgspec
import pytest

from postroom.broker.base import Broker, Capabilities
from postroom.broker.memory import MemoryBroker
from postroom.errors import PostroomError
from postroom.message import Message
from postroom.store.beside import StoredBroker
from postroom.store.sqlite import SQLiteStore
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness


class Poor(MemoryBroker):
    """Keeps neither status nor keys, as far as it tells; it forgets each message at its end."""

    capabilities: ClassVar[Capabilities] = msgspec.structs.replace(
        MemoryBroker.capabilities,
        jobs=False,
        deduplication=False,
        unique=False,
        known_ids=False,
        transactional_publish=False,
    )

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        keyless = [
            message
            if message.unique is None
            else msgspec.structs.replace(message, dedup_window=0.0, unique=None, replace=False)
            for message in messages
        ]
        # Each on its own: a window of no length ends at the next look.
        return [(await super(Poor, self).publish([message]))[0] for message in keyless]


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
