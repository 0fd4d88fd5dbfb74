"""How the demo speaks: headings, few words, tables, and a mark for each claim that held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from postroom.demo.processes import DemoFailed

_WIDTH = 88
_MOST_FOUND = 1000


class Waiting:
    """What is shown while something takes its time."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def now(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


class Narrator:
    """Writes to a terminal or into a pipe."""

    def __init__(self, *, color: bool = True) -> None:
        self.console = Console(no_color=not color, highlight=False)
        self.console.width = min(self.console.width, _WIDTH)
        fancy = self.console.encoding.lower().startswith("utf")
        self._mark = "✓" if fancy else "ok"
        self._box = box.SIMPLE_HEAD if fancy else box.ASCII

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{escape(text)}[/]", align="left", style="cyan")

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def quote(self, text: str) -> None:
        """Something that another program has written."""
        self.console.print(Padding(Text(text, style="dim", overflow="fold"), (0, 0, 0, 2)))

    def commands(self, *lines: str) -> None:
        """What can be typed: never broken into lines, so that it can be copied."""
        for line in lines:
            self.console.print(Text(f"  {line}", style="dim"), soft_wrap=True)

    def check(self, holds: bool, claim: str, found: object) -> None:
        """Put the mark on a claim that holds. Raises ``DemoFailed`` with what was ``found`` otherwise."""
        if not holds:
            raise DemoFailed(f"not so: {claim}\nfound: {shorten(str(found), _MOST_FOUND)}")
        self.console.print(self._marked(claim))

    def table(self, columns: Sequence[tuple[str, Literal["left", "right"]]], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=self._box, show_edge=False, pad_edge=False, header_style="bold")
        for name, side in columns:
            table.add_column(name, justify=side, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.console.print(Padding(table, (0, 0, 1, 2), expand=False))

    @contextmanager
    def waiting(self, text: str, total: int | None = None) -> Iterator[Waiting]:
        """A spinner, or a bar if the ``total`` is known; on a terminal only."""
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(bar_width=30), MofNCompleteColumn()]
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield Waiting(progress, progress.add_task(escape(text), total=total))

    def _marked(self, claim: str) -> Table:
        """A grid, so that a long claim is wrapped beside its mark and not below it."""
        grid = Table.grid(padding=(0, 1))
        grid.add_row(f"[bold green]{self._mark}[/]", escape(claim))
        return grid

    def failed(self, text: str) -> None:
        """The end of a demo that did not come out: the first line says why, the others are details."""
        reason, _, details = text.partition("\n")
        self.console.print(f"\n[bold red]The demo failed:[/] {escape(reason)}")
        self.quote(details)
