"""How soon one job starts on an idle system, and what the waiting for it costs."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.child import Child, cpu_seconds, run, say
from benchmarks.scale import Scale
from benchmarks.table import Result, Target

MEDIAN_TARGET = Target("<=", 2.0, "ms")
TAIL_TARGET = Target("<=", 10.0, "ms")
IDLE_TARGET = Target("<=", 1.0, "%")

_SETTLE = 2.0


def work() -> dict[int, float]:
    """In a child: a worker that waits. Answers ``cpu``, and stops at anything else. Returns when each job started."""
    from benchmarks.tasks import app, starts

    app.connect()
    threading.Thread(target=_answer, daemon=True).start()
    app.run_worker(queues=["stamps"])
    app.close()
    return starts


def _answer() -> None:
    say("ready")
    while sys.stdin.readline().strip() == "cpu":
        say(cpu_seconds())
    os.kill(os.getpid(), signal.SIGTERM)


def produce(count: int, pause: float) -> list[tuple[float, float]]:
    """In a child: single jobs with pauses. Returns for each when it was enqueued, and when that was confirmed."""
    from benchmarks.tasks import app, stamp

    app.connect()
    times = []
    for number in range(count):
        # Uneven pauses: even ones could fall in step with a poll of the worker.
        time.sleep(random.uniform(0.5, 1.5) * pause)
        begin = time.monotonic()
        stamp.enqueue(number)
        times.append((begin, time.monotonic()))
    app.close()
    return times


def measure(scale: Scale, folder: Path) -> list[Result]:
    broker = f"sqlite:///{folder}/latency.db"
    worker = Child(work, broker=broker)
    try:
        worker.read()
        time.sleep(min(_SETTLE, scale.idle))
        idle = _idle_share(worker, scale.idle)
        times = run(produce, broker=broker, count=scale.samples, pause=scale.pause)
        worker.tell("stop")
        starts: dict[str, Any] = worker.result()
    finally:
        worker.kill()
    # A worker may start a job before its producer has read the confirmation: that is no wait, and no negative one.
    confirmed = sorted(max(0.0, starts[str(number)] - end) * 1000 for number, (_, end) in enumerate(times))
    called = sorted((starts[str(number)] - begin) * 1000 for number, (begin, _) in enumerate(times))
    return [
        _percentile("enqueue confirmed to job started, p50", confirmed, 0.50, MEDIAN_TARGET),
        _percentile("enqueue confirmed to job started, p99", confirmed, 0.99, TAIL_TARGET),
        _percentile("enqueue called to job started, p50", called, 0.50, None),
        _percentile("enqueue called to job started, p99", called, 0.99, None),
        Result(name="idle worker", unit="% of a core", postroom=idle, runs=(idle,), target=IDLE_TARGET),
    ]


def _idle_share(worker: Child, seconds: float) -> float:
    begin, before = time.monotonic(), float(worker.ask("cpu"))
    time.sleep(seconds)
    return (float(worker.ask("cpu")) - before) / (time.monotonic() - begin) * 100


def _percentile(name: str, ordered: list[float], share: float, target: Target | None) -> Result:
    value = ordered[min(len(ordered) - 1, int(len(ordered) * share))]
    return Result(name=name, unit="ms", postroom=value, runs=(value,), target=target)
