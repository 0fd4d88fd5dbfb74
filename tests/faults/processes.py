"""Real processes to do harm to, and what they have written down."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from postroom import App
from postroom.message import JobRecord, JobState

ROOT = Path(__file__).parents[2]
TARGET = "tests.faults.app:app"


class Stage:
    """A broker (a temporary file, unless a URL names another), a journal folder, and the worker processes on them."""

    def __init__(self, folder: Path, *, lease: float = 30.0, url: str | None = None) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder}/postroom.db"
        self.journal = folder / "journal"
        self.journal.mkdir()
        self.accounts = folder / "accounts.db"
        self.environment = {
            **os.environ,
            "POSTROOM_BROKER": self.url,
            "FAULTS_JOURNAL": str(self.journal),
            "FAULTS_ACCOUNTS": str(self.accounts),
            "FAULTS_LEASE": str(lease),
            "PYTHONPATH": str(ROOT),
        }
        self.workers: list[subprocess.Popen[bytes]] = []
        self.log = open(folder / "workers.log", "ab")  # noqa: SIM115 -- closed with the stage

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        """One worker process without a supervisor, so that a kill hits the very process that runs handlers."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker", *options],
            env=self.environment,
            cwd=ROOT,
            stdout=self.log,
            stderr=self.log,
        )
        self.workers.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self.workers.remove(process)

    def close(self) -> None:
        for process in list(self.workers):
            process.send_signal(signal.SIGCONT)
            self.kill(process)
        self.log.close()

    def records(self) -> list[dict[str, Any]]:
        """Everything all processes have written, in order of time."""
        lines = [line for path in self.journal.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
        # The last one of a file may just be being written.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(records, key=lambda record: record["t"])

    def counts(self, event: str) -> Counter[str]:
        return Counter(record["id"] for record in self.records() if record["event"] == event)

    def holders(self, workers: set[int]) -> dict[str, list[int]]:
        """In which of these worker processes each job was started, one after the other."""
        found: dict[str, list[int]] = {}
        for record in self.records():
            if record["event"] == "start":
                # A suspect runs in a child, which dies with its worker.
                worker = record["parent"] if record["parent"] in workers else record["pid"]
                found.setdefault(record["id"], []).append(worker)
        return found

    def wait_for(self, event: str, job_id: str, times: int = 1, timeout: float = 60.0) -> list[dict[str, Any]]:
        """The records of that event for that job, once there are so many."""
        deadline = time.monotonic() + timeout
        while True:
            found = [record for record in self.records() if record["event"] == event and record["id"] == job_id]
            if len(found) >= times:
                return found
            assert time.monotonic() < deadline, f"{event} of {job_id} {len(found)} times, not {times}: {self.tail()}"
            time.sleep(0.01)

    def wait_for_log(self, pattern: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, (self.folder / "workers.log").read_text()):
            assert time.monotonic() < deadline, f"no {pattern!r} in the log: {self.tail()}"
            time.sleep(0.02)

    def cpu_seconds(self, pid: int) -> float:
        """User and system time of a process so far."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tail(self) -> str:
        return (self.folder / "workers.log").read_text()[-3000:]


@contextmanager
def stage(folder: Path, *, lease: float = 30.0, url: str | None = None) -> Iterator[Stage]:
    made = Stage(folder, lease=lease, url=url)
    try:
        yield made
    finally:
        made.close()


def producer(faults: Stage, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The app's module, anew, on the broker of the stage."""
    for name in ("POSTROOM_BROKER", "FAULTS_JOURNAL", "FAULTS_ACCOUNTS", "FAULTS_LEASE"):
        monkeypatch.setenv(name, faults.environment[name])
    sys.modules.pop("tests.faults.app", None)
    return importlib.import_module("tests.faults.app")


def records_of(app: App, job_id: str) -> JobRecord:
    """The one record of a job."""
    (record,) = app.thread.call(lambda broker: broker.jobs.get(job_id))
    return record


def unfinished(app: App) -> int:
    """Messages that have not come to an end, in all subscriptions."""
    return sum(stats.ready + stats.delayed + stats.running for stats in app.stats())


def wait_until_done(app: App, stage: Stage, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (left := unfinished(app)) > 0:
        assert time.monotonic() < deadline, f"{left} messages are not done: {app.stats()} {stage.tail()}"
        time.sleep(0.05)


def states(app: App, ids: list[str]) -> Counter[JobState]:
    async def count(broker: Any) -> Counter[JobState]:
        found: Counter[JobState] = Counter()
        for job_id in ids:
            found.update(record.state for record in await broker.jobs.get(job_id))
        return found

    return app.thread.call(count)
