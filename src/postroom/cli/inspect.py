"""``postroom queues``, ``jobs`` and ``replay``."""

from __future__ import annotations

import click

from postroom import App, JobState, JobStatus
from postroom.cli.loading import operated
from postroom.cli.output import age, as_json, clock, duration, print_json, print_table


@click.command()
@operated
@as_json
def queues(app: App, json_output: bool) -> None:
    """Show queues and subscriptions in numbers."""
    stats = app.stats()
    if json_output:
        print_json(stats)
        return
    rows = [
        (
            item.name,
            "queue" if item.queue else item.pattern,
            item.ready,
            item.delayed,
            item.running,
            item.dead,
            "" if item.oldest is None else duration(item.oldest),
        )
        for item in stats
    ]
    print_table(("/name", "/topic", ">ready", ">delayed", ">running", ">dead", ">oldest"), rows, "no queues yet")


@click.group()
def jobs() -> None:
    """Show, list or cancel jobs."""


@jobs.command()
@click.argument("job_id", metavar="ID")
@operated
@as_json
def show(app: App, job_id: str, json_output: bool) -> None:
    """Show one job: state, times, result, failures."""
    status = app.job(job_id).status()
    if json_output:
        print_json(status)
    else:
        _describe(status)


@jobs.command(name="list")
@click.option("--queue", help="Only of this queue or subscription.")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@operated
@as_json
def list_jobs(app: App, queue: str | None, state: str | None, limit: int, json_output: bool) -> None:
    """List the newest jobs."""
    wanted = JobState(state) if state else None
    found = app.thread.call(lambda broker: broker.jobs.search(subscription=queue, state=wanted, limit=limit))
    if json_output:
        print_json(found)
        return
    rows = [(item.id, item.name, item.subscription, item.state, item.attempt, age(item.created_at)) for item in found]
    print_table(("id", "/name", "/queue", "state", ">attempt", ">age"), rows, "no jobs")


@jobs.command()
@click.argument("job_id", metavar="ID")
@operated
@as_json
def cancel(app: App, job_id: str, json_output: bool) -> None:
    """Cancel a job that has not ended. Exit code 1 if it had."""
    answer = app.job(job_id).cancel()
    print_json({"id": job_id, "answer": answer}) if json_output else click.echo(answer)
    if answer == "finished":
        raise SystemExit(1)


@click.command()
@click.argument("subscription")
@click.option("--since", type=float, metavar="UNIX-TIME", help="Only events published since then.")
@operated
@as_json
def replay(app: App, subscription: str, since: float | None, json_output: bool) -> None:
    """Deliver retained events once more to SUBSCRIPTION, and to it alone."""
    count = app.replay(subscription, since=since)
    print_json({"replayed": count}) if json_output else click.echo(f"{count} events will be delivered again")


def _describe(status: JobStatus) -> None:
    rows: list[tuple[str, object]] = [
        ("id", status.id),
        ("name", status.name),
        ("state", status.state),
        ("attempt", status.attempt),
        ("created", clock(status.created_at)),
        ("started", clock(status.started_at)),
        ("finished", clock(status.finished_at)),
        ("next attempt", clock(status.not_before)),
        ("progress", f"{status.progress.fraction:.0%} {status.progress.text}" if status.progress else ""),
        ("result", "" if status.result is None else status.result),
        ("in", ", ".join(f"{name}: {state}" for name, state in status.subscriptions.items())),
    ]
    for label, value in rows:
        if value != "":
            click.echo(f"{label:13} {value}")
    for failure in status.failures:
        what = f"{failure.error or failure.reason}: {failure.message}"
        click.echo(f"attempt {failure.attempt:<5} {clock(failure.failed_at)}  {what}")
