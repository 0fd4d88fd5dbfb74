"""The command line, as real processes on a real file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TASKS = """
from postroom import App, RetryPolicy, exponential

app = App()
orders = app.topic("order.new", dict)

@app.task
def add(a: int, b: int = 1) -> int:
    return a + b

@app.task(queue="bad", retry=RetryPolicy(max_attempts=2, backoff=exponential(first=0.01)))
def fail() -> None:
    raise ValueError("never")

@app.subscribe("order.*", "audit")
def audit(event: dict) -> None:
    print("order", event["id"], flush=True)
"""


class Shell:
    """Runs ``postroom`` in a folder with a ``tasks.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tasks.py").write_text(TASKS)
        self.environment = {**os.environ, "POSTROOM_APP": "tasks:app", "COLUMNS": "80"}
        self.environment.pop("POSTROOM_BROKER", None)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "postroom", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def postroom(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_from_enqueue_to_redrive(postroom: Shell) -> None:
    job = postroom("enqueue", "add", "a=3").strip()
    failing = postroom.json("enqueue", "fail")["id"]
    event = postroom("publish", "order.new", '{"id": 7}').strip()
    assert {item["name"]: item["ready"] for item in postroom.json("queues")} == {"default": 1, "bad": 1, "audit": 1}
    assert "order 7" in postroom("worker", "tasks:app", "--drain")
    postroom("worker", "tasks:app", "--drain")

    assert postroom.json("jobs", "show", job)["result"] == 4
    assert "succeeded" in postroom("jobs", "show", event)
    assert [item["id"] for item in postroom.json("jobs", "list", "--state", "dead")] == [failing]
    assert failing in postroom("jobs", "list"), "ids are never cut off: they are there to be copied"
    assert postroom.json("dead", "list") == [{"subscription": "bad", "dead": 1}]
    assert "ValueError: never" in postroom("dead", "list", "bad")
    assert "raise ValueError" in postroom("dead", "show", "bad", failing)

    assert postroom("dead", "redrive", "bad", "--filter", "error=KeyError") == "0 redriven\n"
    assert postroom("dead", "redrive", "bad", failing) == "1 redriven\n"
    assert "not among the dead letters" in postroom("dead", "redrive", "bad", failing, code=1)
    postroom("worker", "tasks:app", "--drain")
    postroom("worker", "tasks:app", "--drain")
    assert postroom("dead", "discard", "bad", "--all", "--yes") == "1 discarded\n"
    assert postroom("dead", "list") == "no dead letters\n"
    assert postroom.json("replay", "audit") == {"replayed": 1}


def test_waiting_for_a_result(postroom: Shell) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "postroom", "worker", "tasks:app", "--processes", "2"],
        cwd=postroom.folder,
        env=postroom.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert postroom("enqueue", "add", '{"a": 3, "b": 4}', "--wait", "20") == "7\n"
        assert "ValueError: never" in postroom("enqueue", "fail", "--wait", "20", code=1)
    finally:
        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=20)
    assert worker.returncode == 0
    assert log.count("works on") == 2


def test_workers_that_can_never_start_are_not_started_for_ever(postroom: Shell) -> None:
    postroom.environment["POSTROOM_BROKER"] = "rabbit://localhost"
    said = postroom("worker", "tasks:app", "--processes", "2", code=1)
    assert "no broker for 'rabbit://'" in said
    assert "another" not in said


def test_a_killed_worker_is_replaced_and_orphans_stop(postroom: Shell) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "postroom", "worker", "tasks:app"],
        cwd=postroom.folder,
        env=postroom.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert supervisor.stderr is not None
    first = _pid(supervisor)
    os.kill(first, signal.SIGKILL)
    second = _pid(supervisor)
    assert second != first
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 10
    while _alive(second):
        assert time.monotonic() < deadline, "a worker must not outlive its supervisor"
        time.sleep(0.05)
    supervisor.stderr.close()


def _pid(supervisor: subprocess.Popen[str]) -> int:
    assert supervisor.stderr is not None
    for line in supervisor.stderr:
        if "works on" in line:
            return int(line.partition("worker ")[2].split()[0])
    raise AssertionError("the supervisor ended")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("enqueue", "ad", "a=1"), 1, "did you mean 'add'"),
        (("enqueue", "add", "a=x"), 1, "$.a"),
        (("enqueue", "add", "a"), 1, "NAME=VALUE"),
        (("enqueue", "add", "{"), 1, "not JSON"),
        (("publish", "order.old", "{}"), 1, "order.new"),
        (("publish", "order.new", "[]"), 1, "object"),
        (("worker", "taks:app"), 1, "did you mean tasks"),
        (("worker", "tasks:ap"), 1, "did you mean tasks:app"),
        (("worker", "tasks:orders"), 1, "not a postroom.App"),
        (("worker", "missing.py:app"), 1, "no file"),
        (("worker", "tasks:app", "--queues", "defalt"), 1, "did you mean 'default'"),
        (("queues", "--broker", "sqlite:///nothing.db"), 1, "there is no nothing.db"),
        (("queues", "--broker", "mongodb://x"), 1, "no broker for"),
        (("jobs", "show", "nobody"), 1, "no job nobody"),
        (("dead", "list", "nothing"), 1, "nothing"),
        (("dead", "redrive", "bad"), 1, "--all"),
        (("dead", "discard", "bad"), 1, "--all"),
        (("serve", "tasks:app", "--host", "0.0.0.0"), 1, "token"),
        (("nonsense",), 2, "No such command"),
        (("enqueue",), 2, "Missing argument"),
    ],
)
def test_mistakes_get_one_clear_line(postroom: Shell, arguments: tuple[str, ...], code: int, text: str) -> None:
    assert text in postroom(*arguments, code=code)


def test_looking_never_creates_a_file(postroom: Shell) -> None:
    del postroom.environment["POSTROOM_APP"]
    assert "there is no postroom.db" in postroom("queues", code=1)
    assert not list(postroom.folder.glob("*.db"))


def test_every_command_has_help(postroom: Shell) -> None:
    commands = [line.split()[0] for line in postroom("--help").partition("Commands:")[2].splitlines() if line.strip()]
    assert len(commands) >= 9
    for command in commands:
        assert "Usage:" in postroom(command, "--help")
