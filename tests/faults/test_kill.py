"""Workers that are killed, frozen or kill themselves."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from postroom import JobState
from tests.faults.processes import ROOT, TARGET, Stage, producer, records_of, stage, states, wait_until_done
from tests.faults.scenarios import FIVE, freeze_a_worker, killers_among_innocents


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_a_worker_every_second_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3, I6, C4: 4 workers, 10,000 jobs; done = sent, a second start only after its holder was killed."""
    jobs = tasks.work.enqueue_many(tasks.work.call(0.02) for _ in range(10_000))
    ids = [job.id for job in jobs]
    workers = [faults.worker("20") for _ in range(4)]
    pids = {worker.pid for worker in workers}
    killed: set[int] = set()
    rng = random.Random(4)
    deadline = time.monotonic() + 180
    while tasks.app.stats()[0].ready + tasks.app.stats()[0].running > 0:
        assert time.monotonic() < deadline, faults.tail()
        time.sleep(1.0)
        victim = rng.choice(workers)
        killed.add(victim.pid)
        faults.kill(victim)
        workers[workers.index(victim)] = faults.worker("20")
        pids |= {worker.pid for worker in workers}
    wait_until_done(tasks.app, faults, 30)

    assert len(killed) >= 3, "the jobs were done before the workers could be killed"
    ends, starts = faults.counts("end"), faults.counts("start")
    assert set(ends) == set(ids)
    assert states(tasks.app, ids) == {JobState.SUCCEEDED: 10_000}
    unexplained = [job_id for job_id, ran_in in faults.holders(pids).items() if not set(ran_in[:-1]) <= killed]
    assert not unexplained
    # Per death: what ran, what had ended but was not settled yet, and its suspect in a child.
    assert sum(starts.values()) - len(ids) <= (2 * 20 + 1) * len(killed)


@pytest.mark.slow
def test_busy_workers_run_every_job_once(faults: Stage, tasks: ModuleType) -> None:
    """I3, C3: without any fault there is no duplicate, however many claims are open at once."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.0) for _ in range(20_000))]
    for _ in range(3):
        faults.worker("50")
    wait_until_done(tasks.app, faults, 60)
    assert faults.counts("start") == dict.fromkeys(ids, 1)
    assert faults.counts("end") == dict.fromkeys(ids, 1)
    assert "not settled" not in faults.tail()


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_redelivery_after_a_kill_is_prompt(faults: Stage, tasks: ModuleType) -> None:
    """C4: another worker starts the message within 2 s (p99) of the kill; the message runs apart, as a suspect."""
    delays = []
    survivor = faults.worker("5")
    first = tasks.block.enqueue(0.0)
    first.result(timeout=20)
    for _ in range(10):
        survivor.send_signal(signal.SIGSTOP)
        victim = faults.worker("5")
        job = tasks.block.enqueue(0.3)
        faults.wait_for("start", job.id)
        survivor.send_signal(signal.SIGCONT)
        killed_at = time.monotonic()
        faults.kill(victim)
        second = faults.wait_for("start", job.id, times=2)[1]
        delays.append(second["t"] - killed_at)
        assert job.result(timeout=20) == "done"
        assert records_of(tasks.app, job.id).attempt == 2
    assert max(delays) <= 2.0, delays
    print(f"redelivery after kill -9: median {statistics.median(delays):.2f} s, max {max(delays):.2f} s")


@pytest.mark.timed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
def test_all_that_a_dead_worker_ran_is_run_by_a_child_that_was_ready(faults: Stage, tasks: ModuleType) -> None:
    """C4: ten at once; no child process has to be started first, and none waits longer than those before it run."""
    victim = faults.worker("10")
    jobs = [tasks.linger.enqueue() for _ in range(10)]
    for job in jobs:
        faults.wait_for("start", job.id)
    survivor = faults.worker("10")
    spare = _child_of(survivor.pid, b"spawn_main")
    killed_at = time.monotonic()
    faults.kill(victim)
    again = [faults.wait_for("start", job.id, times=2)[1] for job in jobs]
    assert {start["pid"] for start in again} == {spare}
    assert {start["attempt"] for start in again} == {2}
    took = max(start["t"] for start in again) - killed_at
    assert took <= 30.0
    print(f"ten jobs run elsewhere {took:.2f} s after kill -9")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
def test_the_supervisor_hands_on_that_no_spare_is_wanted(faults: Stage) -> None:
    command = [sys.executable, "-m", "postroom", "worker", TARGET, "--no-spare"]
    supervisor = subprocess.Popen(command, env=faults.environment, cwd=ROOT, stdout=faults.log, stderr=faults.log)
    try:
        worker = _child_of(supervisor.pid, b"--child")
        assert b"--no-spare" in Path(f"/proc/{worker}/cmdline").read_bytes().split(b"\0")
    finally:
        supervisor.terminate()
        assert supervisor.wait(timeout=60) == 0


def test_nothing_is_charged_for_a_child_that_died_idle(faults: Stage, tasks: ModuleType) -> None:
    """Not even while it is still dying, and the system calls it alive."""
    faults.worker("5")
    last = tasks.crash.enqueue("not")
    for _ in range(5):
        assert last.outcome(timeout=60).attempt == 1
        idle = faults.wait_for("end", last.id)[-1]["pid"]
        os.kill(idle, signal.SIGKILL)
        last = tasks.crash.enqueue("not")
    assert last.outcome(timeout=60).attempt == 1


def test_a_frozen_worker_is_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8, C5: frozen past its lease, the message runs elsewhere; thawed, the first worker settles nothing."""
    with stage(tmp_path, lease=1.0) as faults:
        tasks = producer(faults, monkeypatch)
        freeze_a_worker(faults, tasks, pause=1.5)
        tasks.app.close()


@pytest.mark.timeout(240)
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b, C7: after five starts each."""
    assert killers_among_innocents(faults, tasks) == [FIVE] * 3


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_crash_in_a_child_process_harms_nobody(faults: Stage, tasks: ModuleType, how: str) -> None:
    """C7: five starts, then a dead letter; the worker itself never dies."""
    worker = faults.worker("5")
    job = tasks.crash.enqueue(how)
    status = job.outcome(timeout=30)
    assert status.state is JobState.DEAD
    assert [failure.reason for failure in status.failures] == ["worker_lost"] * 5
    assert faults.counts("start")[job.id] == 5
    assert tasks.crash.enqueue("not").outcome(timeout=20).state is JobState.SUCCEEDED
    assert worker.poll() is None


def test_a_timeout_kills_a_spinning_child(faults: Stage, tasks: ModuleType) -> None:
    faults.worker("5")
    job = tasks.spin.enqueue()
    status = job.outcome(timeout=30)
    assert status.state is JobState.DEAD
    assert status.error is not None
    assert status.error.reason == "timeout"
    (start,) = faults.wait_for("start", job.id)
    with pytest.raises(ProcessLookupError):
        os.kill(start["pid"], 0)


def test_children_die_with_their_worker(faults: Stage, tasks: ModuleType) -> None:
    worker = faults.worker("5")
    job = tasks.crash.enqueue("spin")
    (start,) = faults.wait_for("start", job.id)
    assert start["pid"] != worker.pid
    faults.kill(worker)
    deadline = time.monotonic() + 10
    while _alive(start["pid"]):
        assert time.monotonic() < deadline, "the child outlived its worker"
        time.sleep(0.02)


def _child_of(parent: int, part: bytes) -> int:
    """The child process with this in its command, once there is one."""
    deadline = time.monotonic() + 30
    while True:
        for task in Path(f"/proc/{parent}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        assert time.monotonic() < deadline, f"process {parent} has no child {part!r}"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
