"""The conformance suite on the SQLite broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from postroom.broker.sqlite import SQLiteBroker
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness


class SQLiteHarness(Harness):
    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self._url = f"sqlite:///{folder}/postroom.db"

    def make_broker(self) -> SQLiteBroker:
        return SQLiteBroker(self._url, clock=self.clock)


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return SQLiteHarness(tmp_path)
