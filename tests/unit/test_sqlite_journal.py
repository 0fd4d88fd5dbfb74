"""A holder is alive until its process ends, however much it holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from postroom.broker.sqlite import holders

pytestmark = pytest.mark.skipif(not holders.SUPPORTED, reason="this system has no POSIX file locks")


def looks_dead(path: Path) -> bool:
    """What another process thinks: the locks of one's own cannot be tested."""
    code = "import sys, pathlib, postroom.broker.sqlite.holders as h; print(h.is_dead(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_a_journal_that_grows_keeps_its_lock(tmp_path: Path) -> None:
    """Else the others would take, and run a second time, all that a busy worker holds."""
    journal = holders.Journal(tmp_path / "holders")
    slots = [journal.note(seq, 7) for seq in range(5000)]
    journal.start(slots[1])
    assert not looks_dead(journal.path)
    assert sorted(holders.claims(journal.path)) == [(seq, 7, seq == 1) for seq in range(5000)]
    journal.close()
    assert looks_dead(journal.path)
