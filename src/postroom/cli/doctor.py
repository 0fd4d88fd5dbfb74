"""``postroom doctor``: what could break a promise here, and what to do about it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from postroom.cli.diagnosis import diagnose
from postroom.cli.loading import find_app
from postroom.cli.output import as_json, console, print_json
from postroom.doctor import Finding

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command()
@click.argument("target", required=False, metavar="[URL | MODULE:APP]")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=30.0,
    show_default=True,
    help="Seconds for each step, as to connect.",
)
@as_json
def doctor(target: str | None, timeout: float, json_output: bool) -> None:
    """Look for what could break a promise: settings, permissions, versions, room.

    Connects as a worker would, then only looks: nothing is declared, sent or deleted. Given an app, also whether
    the broker can do what it asks for. Exits with 1 if there is an error.

    \b
    Examples:
      postroom doctor sqlite:///postroom.db
      postroom doctor tasks:app
      postroom doctor tasks:app --json
    """
    findings = asyncio.run(diagnose(find_app(target), timeout=timeout))
    print_json(findings) if json_output else _show(findings)
    if any(finding.level == "error" for finding in findings):
        raise SystemExit(1)


def _show(findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for finding in findings:
        # Not markup: what a server says must not be taken for colours.
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.title), Text(finding.detail))
        if finding.remedy:
            table.add_row("", "", Text(f"→ {finding.remedy}"))
    counts = Counter(finding.level for finding in findings)
    console().print(table)
    click.echo(f"errors: {counts['error']}, warnings: {counts['warning']}, ok: {counts['ok']}")
