"""``postroom outbox``: from the database in which messages were enqueued to the broker."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from contextlib import closing

import click

from postroom import BrokerUnavailable, PostroomError
from postroom.cli.loading import load_app
from postroom.cli.output import age, as_json, print_json, print_table
from postroom.message import Message
from postroom.store.outbox.relay import Relay

logger = logging.getLogger("postroom.outbox")

_LOOK = 0.2
"""Seconds between looks into an empty outbox."""
_STANDBY = 1.0
_LAST_PAUSE = 5.0

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
        _run(made, stop, drain=drain)
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
        print_json({**stats._asdict(), "messages": [{"id": message.id, "error": why} for message, why in aside]})
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


def _run(made: Relay, stop: threading.Event, *, drain: bool) -> None:
    pause = _LOOK
    while not stop.is_set():
        try:
            sent = made.run_once()
        except BrokerUnavailable as error:
            logger.warning("cannot send, trying again in %.1f s: %s", pause, error)
            stop.wait(pause)
            pause = min(2 * pause, _LAST_PAUSE)
            continue
        pause = _LOOK
        if sent:
            logger.info("sent %d messages", sent)
        elif sent == 0 and drain:
            return
        else:
            stop.wait(_STANDBY if sent is None else _LOOK)


def _publish_nothing(messages: Sequence[Message]) -> list[str | PostroomError]:
    raise AssertionError("only a relay sends")
