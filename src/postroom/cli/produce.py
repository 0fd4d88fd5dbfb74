"""``postroom enqueue`` and ``postroom publish``."""

from __future__ import annotations

import json
from typing import Any

import click

from postroom import App, Job, JobState, ValidationError, codec
from postroom.cli.loading import load_app
from postroom.cli.output import as_json, print_json
from postroom.topology import known

_app = click.option("--app", "target", envvar="POSTROOM_APP", metavar="MODULE:APP", required=True, help="The app.")


@click.command()
@click.argument("task")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]... | JSON")
@_app
@click.option("--delay", type=float, help="Seconds to wait before it may run.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher first.")
@click.option("--key", help="Ordering key.")
@click.option("--idempotency-key", help="All jobs with this key within 24 h are one job.")
@click.option("--wait", type=float, metavar="SECONDS", help="Wait for the end and print the result.")
@as_json
def enqueue(
    task: str, arguments: tuple[str, ...], target: str, wait: float | None, json_output: bool, **options: Any
) -> None:
    """Enqueue TASK. Values are JSON where they parse as JSON, else text.

    \b
    Examples:
      postroom enqueue make_thumbnail photo=cat.jpg width=200 --app tasks:app
      postroom enqueue make_thumbnail '{"photo": "cat.jpg"}' --wait 10 --app tasks:app
    """
    app = load_app(target)
    made = app.tasks[known(task, app.tasks, "task")]
    job: Job[Any] = made.using(**options).enqueue(**_arguments(arguments))
    if wait is None:
        print_json({"id": job.id}) if json_output else click.echo(job.id)
        return
    _finish(job, wait, json_output)


@click.command()
@click.argument("topic")
@click.argument("event", metavar="JSON")
@_app
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header; may be repeated.")
@click.option("--key", help="Ordering key.")
@click.option("--idempotency-key", help="All events with this key within 24 h are one event.")
@as_json
def publish(topic: str, event: str, target: str, headers: tuple[str, ...], json_output: bool, **options: Any) -> None:
    """Publish an event to TOPIC.

    \b
    Example:
      postroom publish user.signup '{"user_id": 7}' --app tasks:app
    """
    app: App = load_app(target)
    made = app.topics[known(topic, app.topics, "topic")]
    pairs = dict(_pair(header, "--header") for header in headers)
    made.check(event.encode())
    value = codec.decoder(made.event.type).decode(event.encode())
    job = made.using(headers=pairs, **options).publish(value)
    print_json({"id": job.id}) if json_output else click.echo(job.id)


def _arguments(given: tuple[str, ...]) -> dict[str, Any]:
    if len(given) == 1 and given[0].lstrip().startswith("{"):
        value = _json(given[0])
        return dict(value)
    return {name: _loose(value) for name, value in (_pair(item, "argument") for item in given)}


def _pair(text: str, what: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValidationError(f"{what} {text!r}: write NAME=VALUE", field=what)
    return name, value


def _loose(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValidationError(f"not JSON: {error}", field="JSON") from error


def _finish(job: Job[Any], wait: float, json_output: bool) -> None:
    status = job.outcome(wait)
    if json_output:
        print_json(status)
    elif status.state is JobState.SUCCEEDED:
        click.echo(json.dumps(status.result))
    else:
        detail = f": {status.error.error or status.error.reason}: {status.error.message}" if status.error else ""
        click.echo(f"{job.id} is {status.state}{detail}", err=True)
    if status.state is not JobState.SUCCEEDED:
        raise SystemExit(1)
