"""``postroom demo`` as a user runs it: a real process with real children."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from click.testing import CliRunner
from PIL import Image

from postroom.cli.main import postroom
from postroom.demo import sheet
from postroom.demo.place import example, photographs

T = TypeVar("T")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for processes that are left over"),
]

PROMISES = (
    "202 means stored",
    "workers share one queue",
    "every subscription hears it",
    "kill -9 loses nothing",
    "five strikes, then kept",
    "effects exactly once",
)


class Demo:
    """A demo in a directory of its own, whose temporary files are there too."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        self.directory = tmp_path
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir()
        self.output = tmp_path / "output.txt"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "postroom", "demo", *arguments],
                cwd=tmp_path,
                env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            assert self.process.poll() is None or re.search(pattern, self.text()), self.text()
            return re.search(pattern, self.text())

        found = until(look, seconds)
        assert found, f"no {pattern!r} in:\n{self.text()}"
        return found

    def wait(self, seconds: float = 100.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the demo did not end:\n{self.text()}")

    def relatives(self) -> list[str]:
        """Command lines of all processes that work in the demo's temporary directory."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"{self.temporary}/postroom-demo-".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # It has just ended, or is somebody else's.
        return found

    def left_nothing(self) -> None:
        """No process and no file; a killed process may take a moment to vanish from the table."""
        assert until(lambda: not self.relatives(), 15.0), self.relatives()
        assert list(self.temporary.glob("postroom-demo-*")) == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Starts the demo; a test that fails leaves none running."""
    started: list[Demo] = []

    def begin(*arguments: str) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield begin
    for demo in started:
        demo.process.kill()
        demo.process.wait()


def until(look: Callable[[], T], seconds: float) -> T:
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_it_keeps_every_promise_and_leaves_only_the_contact_sheet(start: Callable[..., Demo], tmp_path: Path) -> None:
    photos = photographs(example() / "photos")
    assert len(photos) >= 8
    demo = start()
    assert demo.wait() == 0, demo.text()
    text = demo.text()
    summary = text[text.index("Summary") :]
    assert [promise for promise in PROMISES if promise not in summary] == []
    assert all(re.search(rf"^ *{re.escape(photo.name)} +\d+ KiB +\d+ ms +\d+ ms +\d+$", text, re.M) for photo in photos)
    assert "balance 100 -> 90" in text
    assert "\x1b" not in text
    # Only paths that are longer than the line may be.
    assert [line for line in text.splitlines() if len(line) > 80 and "/" not in line] == []
    with Image.open(tmp_path / "postroom-demo.jpg") as picture:
        picture.load()
        # One more each for the job that survived and the photo that was repaired.
        assert picture.size == sheet.size(len(photos) + 2)
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "output.txt", "postroom-demo.jpg"}
    demo.left_nothing()


def test_keep_serves_until_ctrl_c(start: Callable[..., Demo], tmp_path: Path) -> None:
    demo = start("--keep", "--workers", "2", "--out", "sheet.png")
    url = demo.wait_for(r"curl (http://127\.0\.0\.1:\d+)/v1/queues")[1]
    demo.wait_for("Ctrl-C stops it")
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
        assert answer.status == 200
    assert demo.relatives()
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait() == 0, demo.text()
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
    demo.left_nothing()


@pytest.mark.parametrize(("number", "moment", "code"), [
    (signal.SIGINT, "A photo service", 130),
    (signal.SIGTERM, "half-way through .* killed", 143),
])  # fmt: skip
def test_a_signal_ends_everything(start: Callable[..., Demo], number: int, moment: str, code: int) -> None:
    demo = start()
    demo.wait_for(moment)
    demo.process.send_signal(number)
    assert demo.wait() == code, demo.text()
    demo.left_nothing()


def test_processes_do_not_outlive_a_demo_that_is_killed(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("workers are up")
    assert demo.relatives()
    demo.process.kill()
    demo.wait()
    assert until(lambda: not demo.relatives(), 30.0), demo.relatives()


def test_a_claim_that_does_not_hold_fails_the_demo(start: Callable[..., Demo], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "letter.jpg").write_text("Dear Sir or Madam")
    demo = start("--photos", str(photos), "--workers", "2")
    assert demo.wait() == 1, demo.text()
    assert "The demo failed: not so: the job for letter succeeds" in demo.text()
    assert "cannot identify image file" in demo.text()
    assert not (tmp_path / "postroom-demo.jpg").exists()
    demo.left_nothing()


def test_missing_pillow_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = CliRunner().invoke(postroom, ["demo"])
    assert result.exit_code == 1
    assert result.output == "Error: the demo needs Pillow: pip install 'postroom[demo]'\n"


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--photos", "{tmp}"], "no photographs"),
    (["--out", "{tmp}/sheet.txt"], "ending in .jpg or .png"),
    (["--out", "{tmp}/nowhere/sheet.jpg"], "a directory that exists"),
    (["--workers", "0"], "0 is not in the range"),
    (["--broker", "memory://"], "lives within one process"),
    (["--broker", "carrier-pigeon://"], "no broker for 'carrier-pigeon://'"),
    (["--workers", "1"], "1 is not in the range"),
])  # fmt: skip
def test_wrong_options_are_refused_before_anything_starts(tmp_path: Path, arguments: list[str], reason: str) -> None:
    result = CliRunner().invoke(postroom, ["demo", *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert result.exit_code in (1, 2)
    assert reason in result.output
    assert list(tmp_path.iterdir()) == []
