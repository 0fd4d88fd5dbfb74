"""``postroom torture``: clean on SQLite, red with a bug planted, the same again from the same seed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import wait_until
from torture_run import COMMAND, outcome, torture

from postroom.torture.plants import PLANTS

BIGGER = ("--seconds", "4", "--lease", "1", "--every", "0.5", "--workers", "2", "--producers", "1", "--rate", "40")
"""Of what needs faults to be seen."""
FAULTS = {
    "early-ack": ("--faults", "kill", "--relays", "0"),
    "no-fence": ("--faults", "freeze", "--relays", "0"),
    "mark-before-effect": ("--faults", "kill", "--relays", "0"),
    "relay-mark-before-send": ("--faults", "kill", "--relays", "1"),
}


@pytest.mark.timed
@pytest.mark.slow
def test_sqlite_keeps_every_promise(tmp_path: Path) -> None:
    code, told = outcome(
        tmp_path, "--seconds", "8", "--seed", "7", "--lease", "2", "--every", "1", "--report", "x.html"
    )
    assert told["violations"] == []
    assert code == 0
    assert told["sent"] > 200
    assert told["handled"] >= told["sent"] - told["dead"]
    assert told["faults"]["kill"] + told["faults"]["freeze"] >= 4
    assert told["again"] > 0
    assert told["unexplained"] == 0
    page = (tmp_path / "x.html").read_text()
    assert "No violation" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.parametrize("plant", FAULTS)
def test_a_bug_under_fault_is_found(plant: str, tmp_path: Path) -> None:
    # Whether harm hits the moment at which the bug shows depends on more than the seed.
    for seed in ("3", "4", "5", "6"):
        code, told = outcome(tmp_path, "--plant", plant, "--seed", seed, *BIGGER, *FAULTS[plant])
        if code == 1:
            break
    assert code == 1
    assert {violation["kind"] for violation in told["violations"]} & set(PLANTS[plant].finds)


def test_the_same_seed_is_the_same_plan(tmp_path: Path) -> None:
    plans = [torture(tmp_path, "--seed", seed, "--print-plan").stdout for seed in ("5", "5", "6")]
    assert plans[0] == plans[1] != plans[2]
    assert json.loads(plans[0])["faults"]


def test_interrupted_it_leaves_no_process_behind(tmp_path: Path) -> None:
    run = subprocess.Popen([*COMMAND, "--folder", "run"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "run" / "begin").exists(), "it has begun", 60.0)
    run.send_signal(signal.SIGINT)
    assert run.wait(40) == 1
    wait_until(lambda: not _ours(tmp_path / "run"), "all processes have ended")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the frozen stay until they are thawed")
def test_killed_it_leaves_nobody_frozen(tmp_path: Path) -> None:
    arguments = ("--folder", "run", "--faults", "freeze", "--every", "0.3", "--lease", "20", "--workers", "1")
    run = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: "T" in map(_state, _ours(tmp_path / "run")), "somebody is frozen", 60.0)
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not _ours(tmp_path / "run"), "all processes have ended", 30.0)


def _state(process: str) -> str:
    """As in ``ps``: ``T`` is stopped, and an empty one has ended."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _ours(folder: Path) -> list[str]:
    """Processes that are told of this folder by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("memory://",), 1, "lives in one process"),
        (("pigeon://me:secret@loft",), 1, "no broker for"),
        (("--faults", "flood"), 2, "kill, freeze, cut, restart"),
        (("--faults", "cut"), 2, "reached through the network"),
        (("--faults", "restart"), 2, "--restart COMMAND"),
        (("--plant", "weeds"), 2, "early-ack"),
        (("--report", "missing/x.html"), 2, "no directory"),
        (("--effects", "pigeon://me:secret@loft"), 1, "--effects"),
        (("--seconds", "0"), 2, "--seconds"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = torture(tmp_path, *arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "secret" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(('hypothesis', 'sqlalchemy'))); "
    code = without + "sys.argv[1:] = ['torture', '--seconds', '1']; from postroom.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "torture needs hypothesis, sqlalchemy: pip install 'postroom[torture]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
