"""On a server: what is measured of Postroom, and how a hand-written loop is measured that stands beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import latency, producing, worker
from benchmarks.child import Child, await_go, cpu_seconds, run, run_together
from benchmarks.pulse import rate

BODY = b'{"n":1}'


def measured(main: Callable[[], object], count: int) -> dict[str, float]:
    """In a child: microseconds of CPU a message, and messages per second, of ``main``, which handles so many."""
    await_go()
    wall, cpu = time.perf_counter(), cpu_seconds()
    main()
    wall = time.perf_counter() - wall
    return {"cpu": (cpu_seconds() - cpu) / count * 1e6, "rate": count / wall}


def show_loop(what: str, function: Callable[..., dict[str, float]], count: int, **arguments: Any) -> None:
    """A hand-written loop in a process of its own."""
    (found,) = run_together([Child(function, count=count, **arguments)])
    _show_rate(f"raw: {what}", found["cpu"], found["rate"])


def show_workers(url: str, count: int) -> None:
    """A producer, and one worker process, then two."""
    for processes in (1, 2):
        sent = run(producing.enqueue, broker=url, task="noop", count=count)
        if processes == 1:
            print("postroom: enqueue_many", sent)
        results = run_together([Child(worker.drain, broker=url, queue="quick") for _ in range(processes)])
        assert sum(result["count"] for result in results) == count
        cpu = sum(result["cpu"] for result in results) / count * 1e6
        _show_rate(f"postroom: worker, {processes} process(es)", cpu, rate(results))


def show_latency(url: str) -> None:
    """A worker that waits: what it costs, and how soon it starts what is enqueued."""
    waiting = Child(latency.work, broker=url)
    try:
        waiting.read()
        time.sleep(2.0)
        begin, before = time.monotonic(), float(waiting.ask("cpu"))
        time.sleep(5.0)
        share = (float(waiting.ask("cpu")) - before) / (time.monotonic() - begin) * 100
        times = run(latency.produce, broker=url, count=200, pause=0.02)
        waiting.tell("stop")
        starts = waiting.result()
    finally:
        waiting.kill()
    confirmed = [max(0.0, starts[str(n)] - end) * 1000 for n, (_, end) in enumerate(times)]
    show_times("postroom: confirmed to started", confirmed)
    show_times("postroom: enqueue called to started", [(starts[str(n)] - at) * 1000 for n, (at, _) in enumerate(times)])
    print(f"{'postroom: idle worker':42} {share:.2f} % of a core")


def show_times(what: str, times: list[float]) -> None:
    """Milliseconds."""
    ordered = sorted(times)
    middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    print(f"{what:42} p50 {middle:.2f} ms, p99 {late:.2f} ms", flush=True)


def _show_rate(what: str, cpu: float, each: float) -> None:
    print(f"{what:42} {each:10,.0f} messages/s {cpu:8.1f} µs CPU a message", flush=True)
