"""``postroom inbox``: the marks of processed messages in a database."""

from __future__ import annotations

import click

from postroom import create_inbox, purge_inbox
from postroom.cli.output import age, as_json, print_json
from postroom.store.database import connected
from postroom.store.inbox import inbox_stats

_database = click.option(
    "--database",
    required=True,
    envvar="POSTROOM_INBOX",
    metavar="URL",
    help="The database with the marks, as postgresql://…, mysql://… or sqlite:///….",
)


@click.group()
def inbox() -> None:
    """Look after the marks that `ctx.once` and `transaction=` leave in your database."""


@inbox.command()
@_database
def create(database: str) -> None:
    """Create the table, or bring an older one up to date."""
    with connected(database) as connection:
        create_inbox(connection)
    click.echo("the inbox is there")


@inbox.command()
@_database
@click.option("--older-than", type=click.FloatRange(0), required=True, metavar="SECONDS", help="The age of a mark.")
def purge(database: str, older_than: float) -> None:
    """Delete old marks. A message that is delivered again after that is handled again."""
    with connected(database) as connection:
        click.echo(f"{purge_inbox(connection, older_than)} marks deleted")


@inbox.command()
@_database
@as_json
def status(database: str, json_output: bool) -> None:
    """Show how many marks there are, and how old the oldest is."""
    with connected(database) as connection:
        stats = inbox_stats(connection)
    if json_output:
        print_json(stats._asdict())
    else:
        click.echo(f"marks: {stats.marks}" + (f", the oldest for {age(stats.oldest)}" if stats.marks else ""))
