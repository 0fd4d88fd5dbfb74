"""Who is alive, by the operating system's own knowledge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postroom.broker.sqlite import holders

HOLD = """
import sys
from pathlib import Path
from postroom.broker.sqlite.holders import Journal

journal = Journal(Path(sys.argv[1]))
for number in range(1, int(sys.argv[2]) + 1):
    slot = journal.note(number, 1000 + number)
    if number % 2:
        journal.start(slot)
journal.clear(slot)
print(journal.path, flush=True)
sys.stdin.read()
journal.close()
"""


LOOK = """
import sys
from pathlib import Path
from postroom.broker.sqlite.holders import is_dead

print(is_dead(Path(sys.argv[1])))
"""


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has noted so many claims and cleared the last."""
    count = getattr(request, "param", 3)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "holders"), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_a_living_holder_is_not_dead(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = holder
    for _ in range(3):
        assert not holders.is_dead(path), "looking must not take the lock away"
    os.kill(process.pid, signal.SIGSTOP)
    assert not holders.is_dead(path), "a frozen one lives"


@pytest.mark.parametrize("holder", [20_000], indirect=True)
def test_a_journal_that_has_grown_still_holds_its_lock(holder: tuple[subprocess.Popen[str], Path]) -> None:
    _, path = holder
    assert not holders.is_dead(path)
    assert len(list(holders.claims(path))) == 19_999


def test_a_killed_holder_is_dead_and_its_notes_remain(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = holder
    process.kill()
    process.wait()
    assert holders.is_dead(path)
    assert sorted(holders.claims(path)) == [(1, 1001, True), (2, 1002, False)]


def test_a_closed_journal_leaves_nothing(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = holder
    process.communicate("")
    assert list(path.parent.iterdir()) == []
    assert holders.is_dead(path)


def test_ones_own_journal_is_never_opened_twice(tmp_path: Path) -> None:
    journal = holders.Journal(tmp_path / "holders")
    journal.start(journal.note(7, 8))
    assert not holders.is_dead(journal.path)
    assert list(holders.claims(journal.path)) == [(7, 8, True)]
    look = [sys.executable, "-c", LOOK, str(journal.path)]
    seen = subprocess.run(look, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False", "the lock is still held as others see it"
    journal.close()
