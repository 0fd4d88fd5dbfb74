"""PostgreSQL: Postroom beside other job queues on the same server, in one run.

``python -m benchmarks.postgresql_peers [--jobs N] PYTHON…`` starts a server of its own, which syncs every commit.
Each ``PYTHON`` is an interpreter that has one or more of pgqueuer, procrastinate and oban.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import click
from services.postgresql import PostgreSQLServer

from benchmarks import peers, producing, worker
from benchmarks.child import Child, run, run_together
from benchmarks.pulse import rate

PEERS: dict[str, tuple[Callable[..., None], Callable[..., dict[str, Any]], int]] = {
    "pgqueuer": (peers.pgqueuer_enqueue, peers.pgqueuer_drain, 1),
    "procrastinate": (peers.procrastinate_enqueue, peers.procrastinate_drain, 20),
    "oban": (peers.oban_enqueue, peers.oban_drain, 10),
}
"""How each enqueues and drains; and those that take long for a job get one in so many."""


@click.command(help=__doc__)
@click.argument("interpreters", metavar="PYTHON…", nargs=-1)
@click.option("--jobs", type=click.IntRange(1), default=20_000, show_default=True, help="In each run.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="The median counts.")
def main(interpreters: tuple[str, ...], jobs: int, runs: int) -> None:
    found = {
        name: (version, python)
        for python in interpreters
        for name, version in run(peers.versions, python=python, names=list(PEERS)).items()
    }
    for name in PEERS.keys() - found.keys():
        print(f"{name}: none of the interpreters has it")
    server = PostgreSQLServer(Path(tempfile.mkdtemp(prefix="postroom-peers-")))
    server.start()
    try:
        for name in ("postroom", *found):
            asyncio.run(_make_database(server.url, name))
        for processes in (1, 2):
            results: dict[str, list[tuple[float, float]]] = {}
            for number in range(runs):
                # Interleaved: what else the machine does meanwhile meets all of them.
                for name in ("postroom", *found):
                    url = _in_database(server.url, name)
                    install = processes == 1 and number == 0
                    drained = _ours(url, jobs, processes) if name == "postroom" else _theirs(
                        name, found[name][1], url, jobs, processes, install
                    )  # fmt: skip
                    results.setdefault(name, []).append(drained)
            for name, drained in results.items():
                _show(f"{name} {found[name][0] if name in found else ''}", processes, drained)
    finally:
        server.stop()


def _ours(url: str, jobs: int, processes: int) -> tuple[float, float]:
    url += "?migrate=auto"
    run(producing.enqueue, broker=url, task="noop", count=jobs)
    return _drained([Child(worker.drain, broker=url, queue="quick") for _ in range(processes)], jobs)


def _theirs(name: str, python: str, url: str, jobs: int, processes: int, install: bool) -> tuple[float, float]:
    enqueue, drain, share = PEERS[name]
    jobs = max(1, jobs // share)
    run(enqueue, python=python, url=url, count=jobs, install=install)
    return _drained([Child(drain, python=python, url=url) for _ in range(processes)], jobs)


def _drained(children: list[Child], jobs: int) -> tuple[float, float]:
    """Jobs per second, and microseconds of CPU a job."""
    results = run_together(children)
    done = sum(result["count"] for result in results)
    if done != jobs:
        raise RuntimeError(f"{done} of {jobs} jobs were handled")
    return rate(results), sum(result["cpu"] for result in results) / jobs * 1e6


def _show(name: str, processes: int, drained: list[tuple[float, float]]) -> None:
    rates, cpus = zip(*drained, strict=True)
    print(
        f"{name:24} {processes} process(es) {_median(rates):8,.0f} jobs/s ({min(rates):,.0f} to {max(rates):,.0f})"
        f" {_median(cpus):7.1f} µs CPU a job ({min(cpus):.1f} to {max(cpus):.1f})",
        flush=True,
    )


def _median(values: tuple[float, ...]) -> float:
    return sorted(values)[len(values) // 2]


async def _make_database(url: str, name: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()


def _in_database(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


if __name__ == "__main__":
    sys.exit(main())
