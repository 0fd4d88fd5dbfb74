"""Without its extra, postroom.testing says what to install."""

from __future__ import annotations

import subprocess
import sys


def test_a_missing_package_is_named_with_the_way_out() -> None:
    code = (
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'hypothesis' else found(name, *rest)\n"
        "import postroom.testing"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "postroom.testing needs hypothesis: pip install 'postroom[testing]'" in run.stderr


def test_the_clock_needs_no_test_to_run() -> None:
    code = "from postroom.testing.clock import ManualClock; print(ManualClock(5.0).now())"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "5.0"
