"""``postroom bench``: how quick it is here."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from postroom import App, ConfigurationError
from postroom.bench.measure import Measured, measure, steps
from postroom.cli.diagnosis import public
from postroom.cli.loading import find_app
from postroom.cli.output import as_json, print_json, print_table


@click.command()
@click.argument("url", required=False)
@click.option("--jobs", type=click.IntRange(100), default=20_000, show_default=True, help="Jobs that do nothing.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the temporary file goes: its disk is measured. Default: the system's temporary directory.",
)
@as_json
def bench(url: str | None, jobs: int, folder: Path | None, json_output: bool) -> None:
    """Measure the speed of jobs that do nothing, on this machine.

    On a temporary SQLite file, or on the broker at URL: there on queues of its own, which are removed afterwards.
    What others do on the machine or the broker meanwhile makes it slower, and the other way round.

    \b
    Examples:
      postroom bench
      postroom bench --folder /var/lib/shop --json
      postroom bench sqlite:///postroom.db --jobs 5000
    """
    if url is not None:
        if folder is not None:
            raise click.UsageError("--folder is for the temporary file; with a URL there is none")
        _report(_on(_url(url), jobs, quiet=json_output), url, jobs, json_output)
        return
    # It belongs to another broker than the temporary file, which keeps results itself.
    os.environ.pop("POSTROOM_STORE", None)
    with tempfile.TemporaryDirectory(dir=folder, prefix="postroom-bench-") as place:
        url = f"sqlite:///{Path(place).absolute()}/bench.db"
        _report(_on(url, jobs, quiet=json_output), url, jobs, json_output)


def _url(text: str) -> str:
    if "://" not in text:
        raise ConfigurationError(f"{text!r} is no URL of a broker; write for example sqlite:///postroom.db")
    app: App = find_app(text)
    if not app.make_broker().capabilities.shared:
        raise ConfigurationError(
            f"{public(text)} cannot be shared with a worker process; leave it out, or choose another"
        )
    return app.url


def _on(url: str, jobs: int, *, quiet: bool) -> Measured:
    columns = (TextColumn("{task.description:24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=steps(jobs))
        return measure(url, jobs, lambda what, done: bar.update(task, description=what, advance=done))


def _report(measured: Measured, url: str, jobs: int, json_output: bool) -> None:
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    if json_output:
        print_json({"broker": public(url), "machine": machine, "jobs": jobs, "measured": measured})
        return
    click.echo(f"{public(url)}\n{machine}\n")
    speeds = [(item.name, f"{item.jobs_per_second:,.0f}", f"{item.cpu_us:,.1f}") for item in measured.speeds]
    print_table(("many jobs", ">jobs/s", ">µs CPU per job"), speeds, "")
    click.echo()
    latencies = [(item.name, f"{item.p50_ms:.2f}", f"{item.p99_ms:.2f}") for item in measured.latencies]
    print_table(("one job, nothing else to do", ">p50 ms", ">p99 ms"), latencies, "")
