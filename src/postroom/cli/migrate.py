"""``postroom migrate``: the tables in a database that is shared with other programs, shown before they are made."""

from __future__ import annotations

import asyncio

import click

from postroom.cli.loading import find_app


@click.command()
@click.argument("target", required=False, metavar="[URL | MODULE:APP]")
@click.option("--apply", is_flag=True, help="Run it, all of it or nothing.")
def migrate(target: str | None, apply: bool) -> None:
    """Show the SQL that is still to be run in the broker's database; with --apply, run it.

    Only a PostgreSQL broker needs this, before the first start and after an upgrade. The SQL can also go into
    migrations of your own: run each step in a transaction.

    \b
    Examples:
      postroom migrate postgresql://localhost/shop
      postroom migrate postgresql://localhost/shop --apply
      postroom migrate tasks:app > postroom.sql
    """
    broker = find_app(target).make_broker()
    steps = asyncio.run(broker.plan())
    if not steps:
        click.echo("nothing to do", err=True)
    elif apply:
        asyncio.run(broker.migrate())
        click.echo(f"steps done: {len(steps)}", err=True)
    else:
        click.echo("\n".join(steps))
        click.echo(f"steps to do: {len(steps)}; run them by --apply", err=True)
