"""What a job costs in a worker, beside the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import floor, producing
from benchmarks.child import Child, await_go, cpu_seconds, run, run_together
from benchmarks.pulse import pulse, rate
from benchmarks.scale import Scale
from benchmarks.table import Result, Target, median

CPU_TARGET = Target("<=", 2.5)
THREADS_TARGET = Target("<=", 6.0)
TWO_PROCESSES_TARGET = Target(">=", 1.5)


def drain(queue: str) -> dict[str, Any]:
    """In a child: a worker until nothing is left. Returns CPU seconds and when the handlers ran."""
    import postroom.worker.process  # noqa: F401 -- else imported, and counted, when the worker starts
    from benchmarks.tasks import app

    # So is the adapter with its client.
    app.make_broker()
    await_go()
    cpu = cpu_seconds()
    app.run_worker(queues=[queue], drain=True)
    app.close()
    return {"cpu": cpu_seconds() - cpu, **pulse.times()}


@dataclass(frozen=True)
class Drained:
    """A queue emptied by one or more processes."""

    cpu: float
    """Microseconds per message, all processes together."""
    rate: float
    """Messages per second."""


def measure(scale: Scale, folder: Path) -> list[Result]:
    floor_one, floor_two, standard, one, two, threads = [], [], [], [], [], []
    for number in range(scale.runs):
        place = folder / f"worker-{number}"
        place.mkdir()
        count = scale.messages
        floor_one.append(_floor(place / "floor-one.db", count, processes=1))
        standard.append(_floor(place / "standard.db", count, processes=1, driver="sqlite3"))
        one.append(_ours(place / "one.db", count, "noop", "quick", processes=1))
        threads.append(_ours(place / "threads.db", count, "noop_in_thread", "threads", processes=1))
        floor_two.append(_floor(place / "floor-two.db", count, processes=2))
        two.append(_ours(place / "two.db", count, "noop", "quick", processes=2))
    return [
        _cpu("async job in a worker", one, floor_one, CPU_TARGET),
        _cpu("its floor with sqlite3", standard, floor_one, None),
        _rates("async jobs, one process", one, floor_one),
        _rates("async jobs, two processes", two, floor_two),
        Result(
            name="two processes against one",
            unit="times jobs/s",
            postroom=median([double.rate / single.rate for double, single in zip(two, one, strict=True)]),
            floor=median([double.rate / single.rate for double, single in zip(floor_two, floor_one, strict=True)]),
            runs=tuple(double.rate / single.rate for double, single in zip(two, one, strict=True)),
            target=TWO_PROCESSES_TARGET,
        ),
        _cpu("sync job in a thread", threads, floor_one, THREADS_TARGET),
    ]


def _floor(path: Path, count: int, *, processes: int, driver: floor.Driver = "apsw") -> Drained:
    run(floor.enqueue, path=str(path), count=count)
    return _drained([Child(floor.drain, path=str(path), driver=driver) for _ in range(processes)], count)


def _ours(path: Path, count: int, task: str, queue: str, *, processes: int) -> Drained:
    broker = f"sqlite:///{path}"
    run(producing.enqueue, broker=broker, task=task, count=count)
    return _drained([Child(drain, broker=broker, queue=queue) for _ in range(processes)], count)


def _drained(children: list[Child], count: int) -> Drained:
    results = run_together(children)
    done = sum(result["count"] for result in results)
    if done != count:
        raise RuntimeError(f"{done} of {count} messages were handled")
    return Drained(sum(result["cpu"] for result in results) / count * 1e6, rate(results))


def _cpu(name: str, ours: list[Drained], floors: list[Drained], target: Target | None) -> Result:
    return _compared(name, "µs CPU", ours, floors, lambda item: item.cpu, target)


def _rates(name: str, ours: list[Drained], floors: list[Drained]) -> Result:
    return _compared(name, "jobs/s", ours, floors, lambda item: item.rate, None)


def _compared(
    name: str,
    unit: str,
    ours: list[Drained],
    floors: list[Drained],
    value: Callable[[Drained], float],
    target: Target | None,
) -> Result:
    return Result(
        name=name,
        unit=unit,
        postroom=median([value(item) for item in ours]),
        floor=median([value(item) for item in floors]),
        runs=tuple(value(mine) / value(least) for mine, least in zip(ours, floors, strict=True)),
        target=target,
    )
