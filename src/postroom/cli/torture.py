"""``postroom torture``: whether the promises hold while processes are killed, frozen and cut off."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from postroom.cli.diagnosis import public
from postroom.cli.output import as_json, print_json, print_table

if TYPE_CHECKING:
    from postroom.torture.measure import Outcome
    from postroom.torture.plan import Options
    from postroom.torture.tail import Tail

_SHOWN = 10
"""Violations that are told one by one."""


@click.command()
@click.argument("url", required=False)
@click.option("--seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="Time under fault.")
@click.option("--seed", type=click.IntRange(0), help="The same seed makes the same plan; by default a new one.")
@click.option("--faults", metavar="LIST", help="Of kill,freeze,cut,restart; by default all that can be done here.")
@click.option("--every", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds between faults.")
@click.option("--rate", type=click.FloatRange(1), default=50.0, show_default=True, help="Messages a second.")
@click.option("--producers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=3, show_default=True)
@click.option("--relays", type=click.IntRange(0), default=2, show_default=True)
@click.option("--lease", type=click.FloatRange(0.5), default=5.0, show_default=True, help="Seconds.")
@click.option("--store", metavar="URL", help="For a broker without job status; by default a temporary SQLite file.")
@click.option("--effects", metavar="URL", help="Database of the accounts; by default a temporary SQLite file.")
@click.option("--restart", metavar="COMMAND", help="Restarts the broker, and returns 0 once it answers.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the histories and logs in this new directory.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with the time line.")
@click.option("--plant", metavar="BUG", help="Plant a bug, which must be found; `--plant list` names them.")
@click.option("--print-plan", is_flag=True, help="Only print what would be done, as JSON.")
@as_json
def torture(url: str | None, report: Path | None, print_plan: bool, json_output: bool, **given: Any) -> None:
    """Kill, freeze and cut while messages move money, then go through the accounts.

    Processes send, relay and handle messages on a temporary SQLite file, or on the broker at URL: there on queues
    of their own, which are removed afterwards. Use a broker that nobody needs. Exit code 1: a promise was broken.

    \b
    Examples:
      postroom torture
      postroom torture redis://localhost --seconds 300 --report redis.html
      postroom torture amqp://localhost --restart "docker restart -t 0 rabbitmq"
      postroom torture --plant early-ack
    """
    missing = [name for name in ("hypothesis", "pytest", "sqlalchemy") if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"torture needs {', '.join(missing)}: pip install 'postroom[torture]'")
    from postroom.torture.plan import make_plan

    if given["plant"] is not None:
        _check_plant(given["plant"])
    options = _options(url, given)
    if print_plan:
        print_json(make_plan(options))
        return
    if report is not None and not report.absolute().parent.is_dir():
        raise click.UsageError(f"--report: there is no directory {report.absolute().parent}")
    with _folder(given["folder"]) as folder:
        outcome = _run(url, options, folder, given, quiet=json_output)
    if report is not None:
        from postroom.torture.report import page

        report.write_text(page(outcome), encoding="utf-8")
    if json_output:
        print_json(outcome)
    else:
        _tell(outcome, report)
    sys.exit(1 if outcome.violations else 0)


def _check_plant(name: str) -> None:
    from postroom.torture.plants import PLANTS

    if name == "list":
        print_table(("plant", "/what it does"), [(each, plant.text) for each, plant in PLANTS.items()], "")
        sys.exit(0)
    if name not in PLANTS:
        raise click.UsageError(f"--plant {name}: there are {', '.join(PLANTS)}")


def _options(url: str | None, given: dict[str, Any]) -> Options:
    from postroom.torture.plan import FAULTS, Options

    possible = ["kill", "freeze"]
    if url is not None and urlsplit(url).hostname:
        possible.append("cut")
    if given["restart"]:
        possible.append("restart")
    asked = [name.strip() for name in given["faults"].split(",") if name.strip()] if given["faults"] is not None else []
    for name in asked:
        if name not in FAULTS:
            raise click.UsageError(f"--faults {name}: there are {', '.join(FAULTS)}")
        if name not in possible:
            need = "--restart COMMAND" if name == "restart" else "a broker that is reached through the network"
            raise click.UsageError(f"--faults {name}: needs {need}")
    faults = asked if given["faults"] is not None else possible
    names = ("seconds", "rate", "producers", "workers", "relays", "every", "lease")
    return Options(
        seed=secrets.randbelow(10**6) if given["seed"] is None else given["seed"],
        faults=tuple(name for name in FAULTS if name in faults),
        **{name: given[name] for name in names},
    )


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.absolute()
        return
    place = Path(tempfile.mkdtemp(prefix="postroom-torture-"))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _run(url: str | None, options: Options, folder: Path, given: dict[str, Any], *, quiet: bool) -> Outcome:
    from postroom.torture.measure import outcome_of
    from postroom.torture.plan import make_plan
    from postroom.torture.run import Run, needs_store

    broker = url or f"sqlite:///{folder}/broker.db"
    store = given["store"] or (f"sqlite:///{folder}/store.db" if needs_store(broker) else None)
    effects = given["effects"] or f"sqlite:///{folder}/effects.db"
    run = Run(
        make_plan(options),
        broker,
        store=store,
        effects=effects,
        folder=folder,
        restart=given["restart"],
        plant=given["plant"],
    )
    # What clients say of a broker that is away belongs to the logs, not to the terminal.
    logging.basicConfig(filename=folder / "conductor.log")
    # Ended from outside, it must still end its own processes: so leave in good order.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    screen = Console(stderr=True)
    if not quiet:
        screen.print(f"seed {options.seed}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("starting", total=1.0, counts="")

        def show(what: str, share: float, tail: Tail) -> None:
            counts = f"{len(tail.sent)} sent, {len(tail.ended)} ended, {tail.faults} faults"
            bar.update(task, description=what, completed=share, counts=counts)

        evidence = run.run(show)
    return outcome_of(
        evidence,
        broker=public(broker) if url else "sqlite:// (a temporary file)",
        effects=public(effects) if given["effects"] else "sqlite:// (a temporary file)",
        machine=f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[-1]:.0f}",
        command=_command(url, options, given),
    )


def _command(url: str | None, options: Options, given: dict[str, Any]) -> str:
    """What repeats it, without what may be secret."""
    words = ["postroom", "torture", *([public(url)] if url else []), "--seed", str(options.seed)]
    for name in ("seconds", "every", "rate", "lease"):
        words += [f"--{name}", f"{getattr(options, name):g}"]
    for name in ("producers", "workers", "relays"):
        words += [f"--{name}", str(getattr(options, name))]
    words += ["--faults", ",".join(options.faults)]
    words += ["--effects", public(given["effects"])] if given["effects"] else []
    words += ["--restart", given["restart"]] if given["restart"] else []
    words += ["--plant", given["plant"]] if given["plant"] else []
    return shlex.join(words)


def _tell(outcome: Outcome, report: Path | None) -> None:
    from postroom.torture.report import figures

    print_table(("", ">"), figures(outcome), "")
    click.echo()
    if not outcome.violations:
        click.echo("no violation")
    else:
        counts: dict[str, int] = {}
        for violation in outcome.violations:
            counts[violation.kind] = counts.get(violation.kind, 0) + 1
        click.echo(f"{len(outcome.violations)} violations: " + ", ".join(f"{k} {n}" for k, n in counts.items()))
        rows = [(each.kind, each.token, each.text) for each in outcome.violations[:_SHOWN]]
        print_table(("kind", "message", "/what"), rows, "")
        if len(outcome.violations) > _SHOWN:
            click.echo(f"… and {len(outcome.violations) - _SHOWN} more; --json has all")
    click.echo(f"\nagain: {outcome.command}")
    if report is not None:
        click.echo(f"report: {report}")
