"""How long ``import postroom`` takes: every command and every process begins with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.scale import Scale
from benchmarks.table import Result, Target, median

TARGET = Target("<=", 150.0, "ms")

_CODE = "import time; begin = time.perf_counter(); import postroom; print(time.perf_counter() - begin)"


def measure(scale: Scale, folder: Path) -> list[Result]:
    # In bare interpreters: a process that had measured anything would have loaded half of it already.
    times = tuple(_import_once() * 1000 for _ in range(scale.imports))
    return [Result(name="import postroom", unit="ms", postroom=median(times), runs=times, target=TARGET)]


def _import_once() -> float:
    return float(subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True).stdout)
