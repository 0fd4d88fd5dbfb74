"""``postroom worker`` and ``postroom serve``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from postroom.cli.loading import load_app
from postroom.errors import ConfigurationError

_FORMAT = "%(asctime)s %(process)d %(levelname)-7s %(message)s"


@click.command()
@click.argument("target", metavar="MODULE:APP", envvar="POSTROOM_APP")
@click.option(
    "--concurrency", "-c", type=click.IntRange(1), default=50, show_default=True, help="Handlers at once, each process."
)
@click.option("--processes", "-p", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--queues", "-q", metavar="A,B", help="Only these queues and subscriptions.")
@click.option("--drain", is_flag=True, help="Stop once nothing is ready or running.")
@click.option("--reload", is_flag=True, help="Restart when a Python file below this directory changes.")
@click.option(
    "--grace", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish when stopping."
)
@click.option(
    "--relay",
    metavar="URL",
    envvar="POSTROOM_RELAY",
    help="Also send what lies in the outbox of this database, as `outbox relay` does.",
)
@click.option(
    "--spare/--no-spare",
    default=True,
    show_default=True,
    help="Keep a child process ready for what a dead worker had started. It takes memory: the app is imported in it.",
)
@click.option("--child", is_flag=True, hidden=True)
def worker(
    target: str,
    concurrency: int,
    processes: int,
    queues: str | None,
    drain: bool,
    reload: bool,
    grace: float,
    relay: str | None,
    spare: bool,
    child: bool,
) -> None:
    """Run workers that process messages, until SIGTERM or Ctrl-C.

    \b
    Examples:
      postroom worker tasks:app
      postroom worker tasks:app --processes 4 --concurrency 100
      postroom worker tasks:app --queues thumbnails,mail --drain
    """
    from postroom.worker.process import WorkerOptions
    from postroom.worker.process import run as run_one

    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    app = load_app(target)
    names = [name.strip() for name in queues.split(",")] if queues else None
    app.check()
    if not app.topology.select(names):
        raise ConfigurationError(f"{target} has no tasks and no subscriptions; define some with @app.task")
    options = WorkerOptions(concurrency=concurrency, queues=names, drain=drain, grace=grace, relay=relay, spare=spare)
    from postroom.worker.supervise import HOPELESS, Supervisor

    if child:
        try:
            with app:
                run_one(app, options)
        except ConfigurationError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(HOPELESS)
        return
    command = [
        sys.executable,
        "-m",
        "postroom",
        "worker",
        target,
        "--child",
        "-c",
        str(concurrency),
        "--grace",
        str(grace),
    ]
    command += ["-q", queues] if queues else []
    if relay is not None:
        # Not in the command: other users could see the password there.
        os.environ["POSTROOM_RELAY"] = relay
    command += ["--drain"] if drain else []
    command += [] if spare else ["--no-spare"]
    watch = [Path.cwd()] if reload else []
    sys.exit(Supervisor(command, processes=processes, once=drain, watch=watch).run())


@click.command()
@click.argument("target", metavar="MODULE:APP", envvar="POSTROOM_APP")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than loopback need a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File with the bearer token."
)
def serve(target: str, host: str, port: int, token_file: Path | None) -> None:
    """Serve the HTTP gateway.

    The bearer token that clients must send is read from --token-file or the environment variable POSTROOM_TOKEN,
    never from the command line, where other users could see it.

    \b
    Examples:
      postroom serve tasks:app
      POSTROOM_TOKEN=… postroom serve tasks:app --host 0.0.0.0
    """
    from postroom.gateway import serve as run_gateway

    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    token = token_file.read_text().strip() if token_file else os.environ.get("POSTROOM_TOKEN")
    app = load_app(target)
    app.check()
    run_gateway(app, host=host, port=port, token=token)
