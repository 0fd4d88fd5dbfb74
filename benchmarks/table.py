"""Results beside their targets, for people and for programs."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

WIDTH = 140
"""Columns where there is no terminal: the table must not break in a file."""


@dataclass(frozen=True)
class Target:
    """What ``compared`` is held to."""

    relation: Literal["<=", ">="]
    value: float
    unit: str = "x"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table. Numbers are medians of the runs."""

    name: str
    unit: str
    postroom: float
    floor: float | None = None
    """The same in raw SQL (or by the bare route), in the same unit; ``None`` where there is nothing to compare with."""
    runs: tuple[float, ...]
    """What the target speaks of, a ratio or the value itself, once for each run: shows the noise."""
    target: Target | None = None
    """``None``: told, not judged."""

    @property
    def compared(self) -> float:
        return median(self.runs)

    @property
    def passed(self) -> bool | None:
        if self.target is None:
            return None
        if self.target.relation == "<=":
            return self.compared <= self.target.value
        return self.compared >= self.target.value


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def show(results: Sequence[Result], console: Console) -> None:
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=f"{machine()}, {_today()}", title_justify="left")
    for heading in ("measured", "unit"):
        table.add_column(heading, no_wrap=True)
    for heading in ("floor", "Postroom", "compared", "target", "of all runs", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in results:
        table.add_row(*_cells(item))
    console.print(table)


def _cells(item: Result) -> list[str]:
    target = item.target
    unit = "" if target is None else f" {target.unit}"
    return [
        item.name,
        item.unit,
        "" if item.floor is None else _number(item.floor),
        _number(item.postroom),
        _number(item.compared) + unit,
        "" if target is None else f"{target.relation} {_number(target.value)}{unit}",
        f"{_number(min(item.runs))} to {_number(max(item.runs))}",
        {True: "[green]pass[/]", False: "[red]FAIL[/]", None: ""}[item.passed],
    ]


def save(results: Sequence[Result], path: Path) -> None:
    document = {
        "machine": machine(),
        "date": _today(),
        "results": [{**asdict(item), "compared": item.compared, "passed": item.passed} for item in results],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"


def _today() -> str:
    return datetime.date.today().isoformat()


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.2f}"
