"""The benchmarks run from end to end. Sizes are tiny, so no speed is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.table import Result, Target

ROOT = Path(__file__).parents[2]

MEASURED = {
    "startup": {"import postroom"},
    "worker": {
        "async job in a worker",
        "its floor with sqlite3",
        "async jobs, one process",
        "async jobs, two processes",
        "two processes against one",
        "sync job in a thread",
    },
    "producing": {"enqueue_many", "its floor with sqlite3", "64 concurrent aenqueue"},
    "latency": {
        "enqueue confirmed to job started, p50",
        "enqueue confirmed to job started, p99",
        "enqueue called to job started, p50",
        "enqueue called to job started, p99",
        "idle worker",
    },
    "backlog": {"drain, 300 wait", "drain, 900 wait", "many against few", "worker's memory, 900 wait"},
    "gateway": {"POST a job, 32 connections"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_quick_run_measures_everything(name: str, tmp_path: Path) -> None:
    done = run("--quick", "--only", name, "--json", str(tmp_path / "out.json"), "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {item["name"] for item in results} == MEASURED[name]
    for item in results:
        assert item["name"] in done.stdout
        assert item["runs"]
        # A job can start before its producer has read the confirmation, and an idle worker may use nothing.
        assert item["postroom"] > 0 or item["unit"] in ("ms", "% of a core"), item
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"], "a run leaves nothing behind"


def test_an_unknown_benchmark_is_refused() -> None:
    done = run("--only", "speed")
    assert done.returncode == 2
    assert "'startup'" in done.stderr


@pytest.mark.parametrize(
    ("target", "runs", "passed"),
    [
        (Target("<=", 2.5), (2.0, 2.4, 9.0), True),
        (Target("<=", 2.5), (2.0, 2.6, 9.0), False),
        (Target(">=", 0.8), (0.1, 0.8, 0.9), True),
        (Target(">=", 0.8), (0.1, 0.7, 0.9), False),
        (None, (1.0,), None),
    ],
)
def test_the_median_of_the_runs_is_held_to_the_target(
    target: Target | None, runs: tuple[float, ...], passed: bool | None
) -> None:
    assert Result(name="x", unit="x", postroom=1.0, runs=runs, target=target).passed is passed


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
        check=False,
    )
