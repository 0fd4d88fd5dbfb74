"""``postroom outbox``: from the database in which messages were enqueued to the broker."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing

import click

from postroom import PostroomError, create_outbox
from postroom.cli.loading import load_app
from postroom.cli.output import age, as_json, print_json, print_table
from postroom.message import Message
from postroom.store.database import connected
from postroom.store.outbox.relay import Relay

_database = click.option(
    "--database",
    required=True,
    envvar="POSTROOM_OUTBOX",
    metavar="URL",
    help="The database with the outbox, as postgresql://…, mysql://… or sqlite:///….",
)


@click.group()
def outbox() -> None:
    """Send what was enqueued in transactions of other databases."""


@outbox.command()
@_database
def create(database: str) -> None:
    """Create the tables, or bring them up to date."""
    with connected(database) as connection:
        create_outbox(connection)
    click.echo("the outbox is there")


@outbox.command()
@click.argument("target", metavar="MODULE:APP")
@_database
@click.option("--drain", is_flag=True, help="Stop once the outbox is empty.")
def relay(target: str, database: str, drain: bool) -> None:
    """Send what lies in the outbox to the app's broker, until SIGTERM or SIGINT.

    Several relays may run: one is active, another takes over within 10 s when it dies.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)-7s %(message)s")
    app = load_app(target)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    made = Relay(database, app.outlet.send)
    try:
        made.run(stop, drain=drain)
    finally:
        made.close()
        app.close()


@outbox.command()
@_database
@as_json
def status(database: str, json_output: bool) -> None:
    """Show how many messages wait, how old the oldest is, and what could not be sent."""
    with closing(Relay(database, _publish_nothing)) as made:
        stats, aside = made.stats(), made.set_aside()
    if json_output:
        lag = None if stats.oldest is None else max(0.0, time.time() - stats.oldest)
        print_json(
            {**stats._asdict(), "lag": lag, "messages": [{"id": message.id, "error": why} for message, why in aside]}
        )
        return
    oldest = "" if stats.oldest is None else f", the oldest for {age(stats.oldest)}"
    click.echo(f"waiting: {stats.waiting}{oldest}; set aside: {stats.set_aside}")
    if aside:
        print_table(("id", "/name", "/why"), [(message.id, message.name, why) for message, why in aside], "")


@outbox.command()
@_database
def retry(database: str) -> None:
    """Send what was set aside once more."""
    with closing(Relay(database, _publish_nothing)) as made:
        click.echo(f"{made.retry()} messages will be sent again")


def _publish_nothing(messages: Sequence[Message]) -> list[str | PostroomError]:
    raise AssertionError("only a relay sends")
