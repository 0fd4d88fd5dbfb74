"""Tables on terminals of several widths: what is there to be copied is never cut."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from postroom import App, RetryPolicy

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_a_terminal(folder: Path, columns: int, *arguments: str) -> list[str]:
    """The lines that ``postroom`` shows on a terminal so wide, as they reach it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "postroom", *arguments, "--broker", "sqlite:///x.db"]
    with subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        said = b""
        # Linux answers EIO when the other side is closed.
        try:
            while piece := os.read(ours, 65536):
                said += piece
        except OSError:
            pass
        os.close(ours)
    assert process.returncode == 0, said
    return _ESCAPES.sub("", said.decode()).splitlines()


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """The ids of a long-named job and of a dead letter."""
    with App(f"sqlite:///{tmp_path}/x.db") as app:

        @app.task(queue="a-queue-of-a-long-name", name="make_a_thumbnail_of_a_photograph")
        def make() -> None: ...

        @app.task(queue="bad", retry=RetryPolicy(max_attempts=1))
        def fail() -> None:
            raise ValueError("[red] " + "word " * 30)

        made = [make.enqueue().id, fail.enqueue().id]
        app.run_worker(queues=["bad"], drain=True)
    return made


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_ids_are_never_cut(tmp_path: Path, ids: list[str], columns: int) -> None:
    jobs = on_a_terminal(tmp_path, columns, "jobs", "list")
    assert [line.split()[0] for line in jobs[1:] if line[0] != " "] == ids[::-1]
    letters = on_a_terminal(tmp_path, columns, "dead", "list", "bad")
    assert letters[1].startswith(ids[1])
    if columns >= 80:
        assert max(map(len, [*jobs, *letters])) <= columns, "it fits where it can"
    assert jobs[0].split() == ["id", "name", "queue", "state", "attempt", "age"], "no column is left out"
    assert letters[0].split() == ["id", "name", "dead", "for", "reason"]
    assert any("[red]" in line for line in letters)
    assert not any("…" in line for line in (*jobs, *letters)), "nothing is cut off"
