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
THINGS = {
    "published",
    "deduplicated",
    "conflict",
    "delivered",
    "delivered again",
    "suspect",
    "redriven",
    "Ack",
    "Retry",
    "Release",
    "Dead",
    "Cancel",
    "already",
    "lost",
    "extended",
    "extension refused",
    "given back by close",
    "cancel cancelled",
    "cancel requested",
    "cancel finished",
    "purged",
    "discarded",
    "shown as expired",
}


def test_memory() -> None:
    seen = run_state_machine(MemoryHarness, max_examples=150)
    assert not {thing for thing in THINGS if not seen[thing]}


def test_sqlite(tmp_path: Path) -> None:
    def fresh() -> SQLiteHarness:
        folder = tmp_path / uuid4().hex
        folder.mkdir()
        return SQLiteHarness(folder)

    run_state_machine(fresh, max_examples=40, shrink=False)


@pytest.mark.parametrize("defect", FOUND, ids=lambda defect: defect.__name__)
def test_a_defect_is_found(defect: type[DefectiveBroker]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine(lambda: DefectiveHarness(MemoryHarness(), defect), max_examples=1_000, shrink=False)
