"""What tests under fault share."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.faults.processes import Stage, producer


@pytest.fixture
def tasks(faults: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The app's module in this process, as its producer. Each module says what its ``faults`` are."""
    module = producer(faults, monkeypatch)
    yield module
    module.app.close()
