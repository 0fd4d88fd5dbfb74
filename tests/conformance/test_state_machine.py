"""Any sequence of operations on the embedded brokers; and the machine finds planted defects."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from postroom.testing.defects import DefectiveBroker, DefectiveHarness, delivering, keeping
from postroom.testing.state_machine import run_state_machine
from tests.conformance.test_memory import MemoryHarness
from tests.conformance.test_sqlite import SQLiteHarness

FOUND = [
    delivering.DuplicatesADelivery,
    delivering.AcksEarly,
    delivering.NeverRedelivers,
    delivering.HasNoFencing,
    delivering.SettlesTwice,
    delivering.ExtendsNothing,
    delivering.DeliversEarly,
    delivering.ForgetsDeaths,
    delivering.HoldsOnAtClose,
    keeping.ReordersKeys,
    keeping.IgnoresDedup,
    keeping.IgnoresExpiry,
    keeping.IgnoresPriority,
    keeping.StatusGoesBackwards,
    keeping.RedrivesTwice,
    keeping.PurgesTheDead,
]


# What never happened was not tested: a machine that is idle passes too.
LEAST = {
    "published": 300,
    "deduplicated": 20,
    "conflict": 20,
    "delivered": 100,
    "delivered again": 20,
    "suspect": 15,
    "redriven": 5,
    "Ack": 5,
    "Retry": 5,
    "Release": 5,
    "Dead": 5,
    "Cancel": 5,
    "already": 5,
    "lost": 3,
    "extended": 5,
    "extension refused": 5,
    "given back by close": 5,
    "cancel cancelled": 5,
    "cancel requested": 3,
    "cancel finished": 5,
    "purged": 5,
    "discarded": 1,
    "shown as expired": 50,
}


def test_memory() -> None:
    seen = run_state_machine(MemoryHarness, max_examples=150)
    assert not {thing: seen[thing] for thing, least in LEAST.items() if seen[thing] < least}


def test_sqlite(tmp_path: Path) -> None:
    def fresh() -> SQLiteHarness:
        folder = tmp_path / uuid4().hex
        folder.mkdir()
        return SQLiteHarness(folder)

    run_state_machine(fresh, max_examples=40, shrink=False)


@pytest.mark.parametrize("defect", FOUND, ids=lambda defect: defect.__name__)
def test_a_defect_is_found(defect: type[DefectiveBroker]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine(lambda: DefectiveHarness(MemoryHarness(), defect), max_examples=200, shrink=False)
