"""``postroom dead``: what failed for good, and what to do about it."""

from __future__ import annotations

import sys

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from postroom import App, ConfigurationError, DeadLetter
from postroom.cli.loading import operated
from postroom.cli.output import age, as_json, clock, print_json, print_table
from postroom.dead_letters.box import Where


@click.group()
def dead() -> None:
    """Show, redrive or discard dead letters."""


@dead.command(name="list")
@click.argument("subscription", required=False)
@click.option("--after", metavar="ID", help="Begin behind this letter.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@operated
@as_json
def list_letters(app: App, subscription: str | None, after: str | None, limit: int, json_output: bool) -> None:
    """List the dead letters of SUBSCRIPTION, oldest first; without it, how many each has."""
    if subscription is None:
        counts = [(item.name, item.dead) for item in app.stats() if item.dead]
        if json_output:
            print_json([{"subscription": name, "dead": count} for name, count in counts])
        else:
            print_table(("/subscription", ">dead"), counts, "no dead letters")
        return
    letters = app.dead_letters(subscription).list(after=after, limit=limit)
    if json_output:
        print_json(letters)
        return
    rows = [(item.message.id, item.message.name, age(item.dead_at), _reason(item)) for item in letters]
    print_table(("id", "/name", ">dead for", "/reason"), rows, f"{subscription} has no dead letters")


@dead.command()
@click.argument("subscription")
@click.argument("job_id", metavar="ID")
@operated
@as_json
def show(app: App, subscription: str, job_id: str, json_output: bool) -> None:
    """Show one dead letter: body, headers, every attempt with its traceback."""
    letter = app.dead_letters(subscription).get(job_id)
    if json_output:
        print_json(letter)
        return
    message = letter.message
    click.echo(f"id            {message.id}\nname          {message.name}\nqueue         {subscription}")
    click.echo(
        f"created       {clock(message.created_at)}\ndead since    {clock(letter.dead_at)}\n"
        f"redriven      {letter.redriven} times"
    )
    for name, value in message.headers.items():
        click.echo(f"header        {name}: {value}")
    click.echo(f"body          {message.body.decode(errors='backslashreplace')}")
    for failure in letter.failures:
        click.echo(
            f"\nattempt {failure.attempt} on {failure.worker or '?'} at {clock(failure.failed_at)}: {failure.reason}"
        )
        click.echo(failure.traceback.rstrip() or f"  {failure.message}")


@dead.command()
@click.argument("subscription")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option(
    "--filter", "condition", metavar="FIELD=TEXT", help="Those whose name, error or message contains the text."
)
@click.option("--rate", type=float, metavar="N", help="At most so many a second.")
@operated
@as_json
def redrive(
    app: App,
    subscription: str,
    ids: tuple[str, ...],
    everything: bool,
    condition: str | None,
    rate: float | None,
    json_output: bool,
) -> None:
    """Put dead letters back into their queue, attempts counted from 1.

    \b
    Examples:
      postroom dead redrive thumbnails 01a2…
      postroom dead redrive thumbnails --filter error=TimeoutError
      postroom dead redrive thumbnails --all --rate 50
    """
    _must_choose(ids, everything, condition)
    total = len(ids) or next((item.dead for item in app.stats() if item.name == subscription), 0)
    columns = (TextColumn("redriving"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, disable=json_output or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("redriving", total=total)
        moved = app.dead_letters(subscription).redrive(
            ids or None, where=_where(condition), rate=rate, progress=lambda done: bar.update(task, completed=done)
        )
    print_json({"redriven": moved}) if json_output else click.echo(f"{moved} redriven")
    if ids and moved < len(ids):
        raise click.ClickException(f"{len(ids) - moved} of these were not among the dead letters of {subscription}")


@dead.command()
@click.argument("subscription")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option(
    "--filter", "condition", metavar="FIELD=TEXT", help="Those whose name, error or message contains the text."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@operated
@as_json
def discard(
    app: App,
    subscription: str,
    ids: tuple[str, ...],
    everything: bool,
    condition: str | None,
    yes: bool,
    json_output: bool,
) -> None:
    """Delete dead letters for good."""
    _must_choose(ids, everything, condition)
    if not yes:
        click.confirm(f"Delete {len(ids) or 'these'} dead letters of {subscription} for good?", abort=True, err=True)
    gone = app.dead_letters(subscription).discard(
        ids or None, where=_where(condition) or (None if ids else _everything)
    )
    print_json({"discarded": gone}) if json_output else click.echo(f"{gone} discarded")


def _must_choose(ids: tuple[str, ...], everything: bool, condition: str | None) -> None:
    if sum((bool(ids), everything, condition is not None)) != 1:
        raise ConfigurationError("name the letters: ids, or --filter FIELD=TEXT, or --all")


def _where(condition: str | None) -> Where | None:
    if condition is None:
        return None
    field, separator, text = condition.partition("=")
    if not separator or field not in ("name", "error", "message"):
        raise ConfigurationError(f"--filter {condition!r}: write name=TEXT, error=TEXT or message=TEXT")
    if field == "name":
        return lambda letter: text in letter.message.name
    return lambda letter: bool(letter.failures) and text in getattr(letter.failures[-1], field)


def _everything(letter: DeadLetter) -> bool:
    return True


def _reason(letter: DeadLetter) -> str:
    if not letter.failures:
        return ""
    last = letter.failures[-1]
    return f"{last.error or last.reason}: {last.message}"[:120]
