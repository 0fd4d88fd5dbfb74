"""``postroom torture`` on Redis: every fault there is, and the bugs that need few of them to be found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from services.base import Server
from services.restarts import Restarter
from tests.servers import private, url_of
from torture_run import outcome, torture

from postroom.torture.plants import PLANTS

SMALL = ("--rate", "50", "--producers", "2", "--lease", "2", "--every", "0.7")
WITHOUT_FAULTS = {"duplicate", "drop-dead", "drop-publish", "ignore-rollback", "invent", "miscount", "no-dedup"}
UNDER_FAULT = {"forget-redelivery", "lose-on-restart", "no-inbox", "reorder-keys"}
"""Those of SQLite are in ``test_torture.py``."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("redis", tmp_path / "redis") as made:
        yield made


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("redis", tmp_path_factory) as url:
        yield url


@pytest.mark.timed
@pytest.mark.slow
def test_redis_keeps_every_promise(server: Server, tmp_path: Path) -> None:
    with Restarter(server, tmp_path) as restarter:
        code, told = outcome(
            tmp_path, server.url, "--restart", restarter.command, "--seconds", "12", "--seed", "12", "--lease", "3",
            "--every", "1",
        )  # fmt: skip
    assert told["violations"] == []
    assert code == 0
    # A fault is left out whose victim is down at that moment: of so short a run not all kinds may be left.
    assert {"kill", "restart"} <= told["faults"].keys()
    assert restarter.count == told["faults"]["restart"]
    assert told["again"] > 0


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.parametrize("plant", sorted(WITHOUT_FAULTS | UNDER_FAULT))
def test_a_bug_is_found(plant: str, redis_url: str, tmp_path: Path) -> None:
    seconds, faults, workers = ("1.5", "", "1") if plant in WITHOUT_FAULTS else ("3", "kill", "2")
    relays = "1" if plant == "ignore-rollback" else "0"
    code, told = outcome(
        tmp_path, redis_url, "--plant", plant, "--seed", "3", *SMALL, "--faults", faults, "--relays", relays,
        "--seconds", seconds, "--workers", workers,
    )  # fmt: skip
    assert code == 1
    assert {violation["kind"] for violation in told["violations"]} & set(PLANTS[plant].finds)


def test_a_restart_that_fails_ends_the_run(redis_url: str, tmp_path: Path) -> None:
    done = torture(tmp_path, redis_url, "--restart", "false", "--faults", "restart", "--every", "0.5")
    assert done.returncode == 1
    assert "`false` ended with exit code 1" in done.stderr
