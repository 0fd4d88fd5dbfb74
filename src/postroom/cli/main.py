"""The ``postroom`` command. Each command's module is imported when it is used, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
import sys

import click

from postroom.errors import PostroomError

_COMMANDS = {
    "worker": ("run", "Run workers that process messages."),
    "serve": ("run", "Serve the HTTP gateway."),
    "enqueue": ("produce", "Enqueue a task."),
    "publish": ("produce", "Publish an event."),
    "queues": ("inspect", "Show queues and subscriptions in numbers."),
    "jobs": ("inspect", "Show, list or cancel jobs."),
    "dead": ("dead", "Show, redrive or discard dead letters."),
    "replay": ("inspect", "Deliver retained events once more to a subscription."),
    "outbox": ("outbox", "Send what was enqueued in transactions of other databases."),
    "inbox": ("inbox", "Create, purge or show the marks of ctx.once."),
    "migrate": ("migrate", "Show or run the SQL for the tables of the broker."),
    "doctor": ("doctor", "Look for what could break a promise."),
    "bench": ("bench", "Measure the speed on this machine."),
    "torture": ("torture", "Kill, freeze and cut, then see whether the promises held."),
    "demo": ("demo", "Watch a photo service keep its promises."),
}


class Postroom(click.Group):
    """Shows an error of Postroom as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"postroom.cli.{_COMMANDS[name][0]}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PostroomError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Postroom, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="postroom")
def postroom() -> None:
    """Background jobs and events for Python.

    Commands for operators take --app module:app or --broker URL; by default the environment variables
    POSTROOM_APP and POSTROOM_BROKER, else the file postroom.db in the current directory.
    """


def main() -> None:
    """The entry point. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    sys.exit(postroom(prog_name="postroom"))
