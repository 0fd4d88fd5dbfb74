"""``python -m postroom.testing.simulation``: hunting for seeds, and replaying one."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from postroom.testing.simulation.__main__ import main


def test_many_seeds() -> None:
    result = CliRunner().invoke(main, ["--seeds", "0:3", "--places", "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "3 seeds on memory, 0 failed" in result.output
    assert "death at step of a worker" in result.output


def test_a_failure_tells_how_to_replay_it() -> None:
    result = CliRunner().invoke(main, ["--seeds", "1:2", "--plant", "early-ack", "--processes", "1"])
    assert result.exit_code == 1
    assert (
        "replay: python -m postroom.testing.simulation --broker memory --seed 1 --trace --plant early-ack"
        in result.output
    )
    again = CliRunner().invoke(main, ["--seed", "1", "--trace", "--plant", "early-ack"])
    assert again.exit_code == 1
    violation = result.output.splitlines()[1].strip()
    assert violation in again.output
    assert "step of Fetcher.run" in again.output


@pytest.mark.parametrize(
    "arguments", [[], ["--seed", "1", "--seeds", "0:2"], ["--seeds", "5:1"], ["--seeds", "0:2", "--trace"]]
)
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2
