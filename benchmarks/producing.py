"""What it costs to enqueue, and how many enqueues share one write to the disk."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.child import cpu_seconds, run
from benchmarks.scale import Scale
from benchmarks.table import Result, Target, median

CPU_TARGET = Target("<=", 3.0)
SHARING_TARGET = Target(">=", 20.0, "")
PRODUCERS = 64

_CHUNK = 50_000


def enqueue(task: str, count: int) -> dict[str, Any]:
    """In a child: ``enqueue_many`` of so many calls. Returns CPU and wall seconds."""
    from benchmarks import tasks

    producer = getattr(tasks, task)
    tasks.app.connect()
    cpu, begin = cpu_seconds(), time.monotonic()
    for start in range(0, count, _CHUNK):
        numbers = range(start, min(start + _CHUNK, count))
        producer.enqueue_many(producer.call(number, "some text") for number in numbers)
    used = {"cpu": cpu_seconds() - cpu, "wall": time.monotonic() - begin}
    tasks.app.close()
    return used


def enqueue_together(each: int) -> int:
    """In a child: concurrent producers, each of which awaits one ``aenqueue`` after the other.

    Returns the number of transactions committed: with ``synchronous=FULL`` each is one sync of the log
    (https://www.sqlite.org/pragma.html#pragma_synchronous).
    """
    from benchmarks import tasks

    async def produce(producer: int) -> None:
        for number in range(each):
            await tasks.noop.aenqueue(producer * each + number, "some text")

    async def produce_all() -> None:
        await asyncio.gather(*(produce(number) for number in range(PRODUCERS)))

    tasks.app.connect()
    before = tasks.app.thread.call(_commits)
    asyncio.run(produce_all())
    count = tasks.app.thread.call(_commits) - before
    tasks.app.close()
    return count


async def _commits(broker: Any) -> int:
    commits: int = broker.engine.commits
    return commits


def measure(scale: Scale, folder: Path) -> list[Result]:
    floors, standard, ours, shared = [], [], [], []
    for number in range(scale.runs):
        place = folder / f"producing-{number}"
        place.mkdir()
        floors.append(run(floor.enqueue, path=str(place / "floor.db"), count=scale.messages))
        standard.append(run(floor.enqueue, path=str(place / "standard.db"), count=scale.messages, driver="sqlite3"))
        ours.append(run(enqueue, broker=f"sqlite:///{place}/ours.db", task="noop", count=scale.messages))
        commits = run(enqueue_together, broker=f"sqlite:///{place}/together.db", each=scale.concurrent)
        shared.append(PRODUCERS * scale.concurrent / commits)
    return [
        _cpu("enqueue_many", ours, floors, scale.messages, CPU_TARGET),
        _cpu("its floor with sqlite3", standard, floors, scale.messages, None),
        Result(
            name=f"{PRODUCERS} concurrent aenqueue",
            unit="messages/fsync",
            postroom=median(shared),
            runs=tuple(shared),
            target=SHARING_TARGET,
        ),
    ]


def _cpu(
    name: str, measured: list[dict[str, Any]], floors: list[dict[str, Any]], count: int, target: Target | None
) -> Result:
    return Result(
        name=name,
        unit="µs CPU",
        postroom=median([item["cpu"] for item in measured]) / count * 1e6,
        floor=median([item["cpu"] for item in floors]) / count * 1e6,
        runs=tuple(mine["cpu"] / least["cpu"] for mine, least in zip(measured, floors, strict=True)),
        target=target,
    )
