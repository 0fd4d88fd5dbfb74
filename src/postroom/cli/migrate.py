"""``postroom migrate``: the tables in a database that is shared with other programs, shown before they are made."""

from __future__ import annotations

import asyncio

import click

from postroom.cli.loading import find_app
from postroom.store.registry import make_store


@click.command()
@click.argument("target", required=False, metavar="[URL | MODULE:APP]")
@click.option("--store", metavar="URL", help="The database of a store, instead of the broker's.")
@click.option("--apply", is_flag=True, help="Run it, all of it or nothing.")
def migrate(target: str | None, store: str | None, apply: bool) -> None:
    """Show the SQL that is still to be run in the database of the broker, and of the app's store; with --apply, run it.

    Only PostgreSQL needs this, before the first start and after an upgrade. The SQL can also go into migrations of
    your own: run each step in a transaction.

    \b
    Examples:
      postroom migrate postgresql://localhost/shop
      postroom migrate postgresql://localhost/shop --apply
      postroom migrate tasks:app > postroom.sql
      postroom migrate --store postgresql://localhost/shop --apply
    """
    if store is not None and target is not None:
        raise click.UsageError(f"{target} or --store: the app's own store is migrated with its broker")
    kept = find_app(target).make_broker() if store is None else make_store(store)
    steps = asyncio.run(kept.plan())
    if not steps:
        click.echo("nothing to do", err=True)
    elif apply:
        asyncio.run(kept.migrate())
        click.echo(f"steps done: {len(steps)}", err=True)
    else:
        click.echo("\n".join(steps))
        click.echo(f"steps to do: {len(steps)}; run them by --apply", err=True)
