"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

_PIPED_WIDTH = 200

as_json = click.option("--json", "json_output", is_flag=True, help="One JSON document on standard output.")


def print_json(value: Any) -> None:
    """``value`` as indented JSON; bytes become the JSON they hold, or else text."""
    click.echo(json.dumps(msgspec.to_builtins(value, enc_hook=str, builtin_types=(bytes,)), indent=2, default=_plain))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Columns whose name begins with ``>`` are set to the right. Readable in 80 columns, and when piped."""
    if not rows:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(table)


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
