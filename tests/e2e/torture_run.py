"""How tests put a broker to the torture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "postroom", "torture"]


def torture(
    folder: Path, *arguments: str, patience: float = 110.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("POSTROOM")}
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=patience
    )
    assert "Traceback" not in done.stderr
    return done


def outcome(
    folder: Path, *arguments: str, patience: float = 110.0, **environment: str
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    done = torture(folder, *arguments, "--json", patience=patience, **environment)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)
