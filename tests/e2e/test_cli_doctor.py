"""``postroom doctor`` from the shell."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

TASKS = """
from postroom import App

app = App("sqlite:///postroom.db")

@app.task
def add(a: int, b: int) -> int:
    return a + b
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path


def doctor(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("POSTROOM")}
    done = subprocess.run(
        [sys.executable, "-m", "postroom", "doctor", *arguments],
        cwd=folder,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


def create(folder: Path) -> None:
    code = "import tasks; tasks.app.connect(); tasks.app.close()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("sqlite:///postroom.db",), {}),
        (("tasks:app",), {}),
        ((), {"POSTROOM_APP": "tasks:app"}),
        ((), {"POSTROOM_BROKER": "sqlite:///postroom.db"}),
        ((), {}),
    ],
)
def test_a_sound_file(folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    create(folder)
    done = doctor(folder, *arguments, "--json", **environment)
    found = {item["title"]: item["level"] for item in json.loads(done.stdout)}
    assert found["connection"] == found["integrity"] == found["syncing"] == "ok"
    assert ("what the app asks for" in found) == (arguments == ("tasks:app",) or "POSTROOM_APP" in environment)
    assert done.returncode == int("error" in found.values())


def test_an_error_has_exit_code_1_and_a_remedy(folder: Path) -> None:
    create(folder)
    with closing(sqlite3.connect(folder / "postroom.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    done = doctor(folder, "tasks:app")
    assert done.returncode == 1
    assert "written by a newer Postroom" in done.stdout
    assert "→ upgrade Postroom in this environment" in done.stdout
    assert "errors: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("sqlite:///missing.db",), 1, "there is no missing.db"),
        (("tasks:app",), 1, "there is no postroom.db"),
        (("nothing:app",), 1, "no module 'nothing'"),
        (("tasks:app", "--timeout", "0"), 2, "--timeout"),
    ],
)
def test_mistakes_get_one_clear_line(folder: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = doctor(folder, *arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert not list(folder.glob("*.db")), "looking never creates a file"


def test_an_unknown_scheme_is_a_finding(folder: Path) -> None:
    done = doctor(folder, "pigeon://me:secret@loft/", "--json")
    (found,) = json.loads(done.stdout)
    assert (done.returncode, found["level"], found["title"]) == (1, "error", "configuration")
    assert "secret" not in done.stdout + done.stderr
