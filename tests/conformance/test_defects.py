"""The suite can fail: each planted defect makes the tests red that are there for it, and a sound broker passes them."""

from __future__ import annotations

import msgspec
import pytest

from postroom.broker.base import Capabilities
from postroom.errors import BrokerError
from postroom.testing.defects import DEFECTS, DefectiveBroker, DefectiveHarness
from postroom.testing.suite import SUITE, covered_by
from tests.conformance.test_memory import MemoryHarness

CASES = [(defect, name) for defect, names in DEFECTS.items() for name in names]
LASTING = sorted(name for name, test in SUITE.items() if "durability" in test.needs)
FOUND = (AssertionError, pytest.fail.Exception, TimeoutError)


def impatient() -> MemoryHarness:
    harness = MemoryHarness()
    harness.patience = 0.5
    return harness


class Durable(DefectiveBroker):
    """Says that it survives a restart, which brokers of one name do as long as the process lives."""

    def declared(self) -> Capabilities:
        return msgspec.structs.replace(super().declared(), durability="process")


class Forgetful(DefectiveHarness):
    """Its restart loses everything."""

    async def restart(self) -> None:
        clock, self.sound = self.clock, impatient()
        assert clock is not None
        self.sound.clock = clock


@pytest.mark.parametrize(("defect", "name"), CASES, ids=[f"{defect.__name__}-{name}" for defect, name in CASES])
def test_a_defect_is_found(defect: type[DefectiveBroker], name: str) -> None:
    with pytest.raises(FOUND):
        SUITE[name].run(DefectiveHarness(impatient(), defect))


@pytest.mark.parametrize("name", LASTING)
def test_a_loss_at_restart_is_found(name: str) -> None:
    SUITE[name].run(DefectiveHarness(impatient(), Durable))
    with pytest.raises((*FOUND, BrokerError)):
        SUITE[name].run(Forgetful(impatient(), Durable))


@pytest.mark.parametrize("name", sorted(SUITE))
def test_every_test_can_fail(name: str) -> None:
    """For each test of the suite there is a defect that it finds."""
    if name in LASTING:
        return  # Shown above.
    named = [defect for defect, names in DEFECTS.items() if name in names]
    for defect in named or DEFECTS:
        try:
            SUITE[name].run(DefectiveHarness(impatient(), defect))
        except FOUND:
            return
        except pytest.skip.Exception:
            continue
    pytest.fail("no defect makes it fail")


def test_the_wrapper_itself_is_no_defect() -> None:
    """What fails above fails because of the defect."""
    for name, skipped_for in covered_by(impatient().capabilities).items():
        if not skipped_for:
            SUITE[name].run(DefectiveHarness(MemoryHarness(), DefectiveBroker))


def test_what_is_skipped_is_known() -> None:
    """Only for a declared capability; a broker that lacks nothing runs everything."""
    memory = impatient().capabilities
    skipped = {name: needs for name, needs in covered_by(memory).items() if needs}
    assert sorted(skipped) == sorted([*LASTING, "limits.test_the_declared_size_is_the_limit"])
    complete = msgspec.structs.replace(memory, durability="fsync", max_message_size=1000)
    assert not any(covered_by(complete).values())
    poor = msgspec.structs.replace(memory, jobs=False, delay=0.0)
    assert covered_by(poor)["jobs.test_search_by_states_that_pass_with_time"] == ("jobs", "delay")
