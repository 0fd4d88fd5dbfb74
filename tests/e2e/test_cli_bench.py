"""``postroom bench`` measures everything and leaves nothing behind. Sizes are tiny, so no speed is judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until

from postroom import App

COMMAND = [sys.executable, "-m", "postroom", "bench"]


def environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith("POSTROOM")}, **more}


def bench(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in done.stderr
    return done


def must_be_complete(document: dict[str, Any]) -> None:
    speeds = {item["name"]: item for item in document["measured"]["speeds"]}
    assert list(speeds) == ["enqueue_many", "aenqueue, 64 at once", "async jobs, one worker", "sync jobs, one worker"]
    assert all(item["jobs_per_second"] > 0 and item["cpu_us"] > 0 for item in speeds.values())
    confirmed, started = document["measured"]["latencies"]
    for item in (confirmed, started):
        assert 0 < item["p50_ms"] <= item["p99_ms"]


def test_on_a_temporary_file(tmp_path: Path) -> None:
    done = bench(tmp_path, "--jobs", "200", "--folder", ".", "--json", POSTROOM_STORE="sqlite:///store.db")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["jobs"] == 200
    must_be_complete(document)
    assert list(tmp_path.iterdir()) == []


def test_beside_the_queues_of_others(tmp_path: Path) -> None:
    with App(f"sqlite:///{tmp_path}/x.db") as app:

        @app.task
        def work() -> None: ...

        work.enqueue()
        done = bench(tmp_path, "sqlite:///x.db", "--jobs", "200")
        assert done.returncode == 0, done.stderr
        for word in ("sqlite:///x.db", "jobs/s", "p99 ms", "aenqueue, 64 at once"):
            assert word in done.stdout
        assert [(item.name, item.ready) for item in app.stats()] == [("default", 1)]


@pytest.mark.parametrize("stop", [signal.SIGINT, None], ids=["Ctrl-C", "a dead worker"])
def test_whatever_ends_it_the_queues_are_removed(tmp_path: Path, stop: signal.Signals | None) -> None:
    with App(f"sqlite:///{tmp_path}/x.db") as app:
        app.connect()
        process = subprocess.Popen(
            [*COMMAND, "sqlite:///x.db", "--jobs", "1000"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # In the midst of the last part, which a frozen worker keeps from ending.
        worker = wait_until(lambda: _worker(process.pid, "-alone"), "single jobs are handled", 60.0)
        wait_until(lambda: _handled(app), "a single job was handled", 60.0)
        os.kill(worker, signal.SIGSTOP)
        if stop is not None:
            process.send_signal(stop)
        else:
            os.kill(worker, signal.SIGKILL)
        said, complaint = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Traceback" not in complaint
        assert (complaint.strip() == "Aborted!") if stop else ("ended with -9" in complaint)
        assert said == ""
        assert app.stats() == []


def _handled(app: App) -> bool:
    """Whether one of the single jobs has been handled: until then the worker may hold the lock of the file."""
    queues = [item.name for item in app.stats() if item.name.endswith("-alone")]
    found = app.thread.call(lambda broker: broker.jobs.search(subscription=queues[0])) if queues else []
    return any(record.state == "succeeded" for record in found)


def _worker(parent: int, queue: str) -> int | None:
    """The process that handles what comes to such a queue."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    for pid, its_parent, arguments in (line.split(maxsplit=2) for line in listed.splitlines()):
        if its_parent == str(parent) and queue in arguments:
            return int(pid)
    return None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("postroom.db",), 1, "no URL of a broker"),
        (("sqlite:///missing.db",), 1, "there is no missing.db"),
        (("memory://",), 1, "cannot be shared"),
        (("pigeon://me:secret@loft",), 1, "no broker for"),
        (("--jobs", "3"), 2, "--jobs"),
        (("--folder", "missing"), 2, "does not exist"),
        (("sqlite:///x.db", "--folder", "."), 2, "--folder is for the temporary file"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = bench(tmp_path, *arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "secret" not in done.stderr
    assert not list(tmp_path.iterdir())
