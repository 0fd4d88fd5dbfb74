"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import click
import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPED_WIDTH = 200
_NARROWEST = 8
"""Characters a column is left with before the table overflows."""

as_json = click.option("--json", "json_output", is_flag=True, help="One JSON document on standard output.")


def print_json(value: Any) -> None:
    """``value`` as indented JSON; bytes become the JSON they hold, or else text."""
    click.echo(json.dumps(msgspec.to_builtins(value, enc_hook=str, builtin_types=(bytes,)), indent=2, default=_plain))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Columns whose name begins with ``>`` are set to the right, and those with ``/`` folded where it is narrow.

    All others are never cut or folded, for ids are there to be copied: rather the table overflows.
    """
    if not rows:
        click.echo(empty)
        return
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    needed = 0
    for column, values in zip(columns, zip(*cells, strict=True), strict=True):
        name, folds = column.lstrip(">/"), column.startswith("/")
        width = max(map(cell_len, (name, *values)))
        least = min(width, _NARROWEST) if folds else width
        needed += least + 2
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(name, justify=justify, no_wrap=not folds, overflow="fold", min_width=least)
    for row in cells:
        # Not markup: what users named must not be taken for colours.
        table.add_row(*map(Text, row))
    screen = console()
    # Where it is too narrow for this, Rich would leave columns out.
    screen.width = max(screen.width, needed)
    screen.print(table)


def console() -> Console:
    """Standard output, with colours on a terminal only."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def age(moment: float | None) -> str:
    """How long ago a unix time was, in words: ``5 s``, ``3 min``, ``2 h``, ``4 d``."""
    return "" if moment is None else duration(time.time() - moment)


def duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def clock(moment: float | None) -> str:
    """A unix time as local date and time."""
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return json.loads(value)
        except ValueError:
            return value.decode(errors="backslashreplace")
    return str(value)
