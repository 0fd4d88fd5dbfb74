"""Measure everything in one run, and print a table."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from benchmarks import backlog, gateway, latency, producing, startup, worker
from benchmarks.scale import FULL, QUICK, Scale
from benchmarks.table import Result, save, show

BENCHMARKS: dict[str, Callable[[Scale, Path], list[Result]]] = {
    "startup": startup.measure,
    "worker": worker.measure,
    "producing": producing.measure,
    "latency": latency.measure,
    "backlog": backlog.measure,
    "gateway": gateway.measure,
}


@click.command(help="Measure Postroom on SQLite beside a floor in raw SQL. Exit code 1 if a target is missed.")
@click.option("--only", type=click.Choice(list(BENCHMARKS)), multiple=True, help="Only this one; may be repeated.")
@click.option("--quick", is_flag=True, help="Tiny sizes: proves that the scripts work, measures nothing.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results here.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where the database files go; "
              "its disk is what is measured. Default: the system's temporary directory.")  # fmt: skip
def main(only: tuple[str, ...], quick: bool, path: Path | None, folder: Path | None) -> None:
    results: list[Result] = []
    progress = Console(stderr=True)
    for name in only or BENCHMARKS:
        with tempfile.TemporaryDirectory(dir=folder, prefix="postroom-benchmark-") as place:
            progress.print(f"measuring {name} …", style="dim")
            results += BENCHMARKS[name](QUICK if quick else FULL, Path(place))
    show(results, Console())
    if path is not None:
        save(results, path)
    missed = any(result.passed is False for result in results)
    sys.exit(1 if missed and not quick else 0)


if __name__ == "__main__":
    main()
