"""What is measured, seen from the producer."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from postroom import App, PostroomError
from postroom.bench.tasks import TEXT, Tasks, define

PRODUCERS = 64
SAMPLES = 100
_PART = 4
"""What costs more by the job is measured with a fourth of the jobs."""
_CHUNK = 1000
_PAUSE = 0.03
"""Seconds between two single jobs, in the mean."""

Progress = Callable[[str, int], None]
"""Told what goes on, and how many steps were done since."""


class Speed(msgspec.Struct, frozen=True):
    """Many jobs at once."""

    name: str
    jobs: int
    jobs_per_second: float
    cpu_us: float
    """Microseconds of CPU a job, user and system, all threads of the one process that does it."""


class Latency(msgspec.Struct, frozen=True):
    """One job at a time on an idle system, in milliseconds from the call of ``enqueue``."""

    name: str
    p50_ms: float
    p99_ms: float


class Measured(msgspec.Struct, frozen=True):
    """What came out."""

    speeds: list[Speed]
    latencies: list[Latency]


def steps(jobs: int) -> int:
    """How many steps ``measure`` tells its progress."""
    return 2 * jobs + 4 * (jobs // _PART) + SAMPLES * (jobs // SAMPLES)


def measure(url: str, jobs: int, progress: Progress) -> Measured:
    """On queues of its own, which are removed again. Raises ``PostroomError``."""
    with App(url) as app:
        name = f"bench-{secrets.token_hex(4)}"
        tasks = define(app, name, _nothing)
        app.connect()
        try:
            return Bench(app, name, tasks, progress).run(jobs)
        finally:
            for queue in tasks.queues:
                app.unsubscribe(queue)


class Bench:
    def __init__(self, app: App, name: str, tasks: Tasks, progress: Progress) -> None:
        self._app = app
        self._name = name
        self._tasks = tasks
        self._progress = progress

    def run(self, jobs: int) -> Measured:
        part = jobs // _PART
        many = self._timed("enqueue_many", jobs, lambda: self._enqueue_many(jobs, "enqueue_many"))
        together = self._timed(
            f"aenqueue, {PRODUCERS} at once", part, lambda: asyncio.run(self._enqueue_together(part))
        )
        on_the_loop = self._drained("async jobs, one worker", self._tasks.on_the_loop.queue, jobs + part)
        self._enqueue_for_threads(part)
        in_threads = self._drained("sync jobs, one worker", self._tasks.in_a_thread.queue, part)
        return Measured([many, together, on_the_loop, in_threads], self._single(jobs // SAMPLES))

    def _timed(self, name: str, jobs: int, work: Callable[[], None]) -> Speed:
        used, begin = time.process_time(), time.monotonic()
        work()
        return _speed(name, jobs, time.monotonic() - begin, time.process_time() - used)

    def _enqueue_many(self, jobs: int, what: str) -> None:
        task = self._tasks.on_the_loop
        for start in range(0, jobs, _CHUNK):
            numbers = range(start, min(start + _CHUNK, jobs))
            task.enqueue_many(task.call(number, TEXT) for number in numbers)
            self._progress(what, len(numbers))

    def _enqueue_for_threads(self, jobs: int) -> None:
        task = self._tasks.in_a_thread
        task.enqueue_many(task.call(number, TEXT) for number in range(jobs))
        self._progress("enqueue for the next", jobs)

    async def _enqueue_together(self, jobs: int) -> None:
        async def produce(numbers: range) -> None:
            for number in numbers:
                await self._tasks.on_the_loop.aenqueue(number, TEXT)
            self._progress("aenqueue", len(numbers))

        await asyncio.gather(*(produce(range(start, jobs, PRODUCERS)) for start in range(PRODUCERS)))

    def _drained(self, name: str, queue: str, jobs: int) -> Speed:
        count = 0
        with self._worker(queue, "drain") as process:
            while "seconds" not in (told := _heard(process)):
                self._progress(name, told["count"] - count)
                count = told["count"]
        self._progress(name, told["count"] - count)
        if told["count"] < jobs:
            raise PostroomError(f"{name}: only {told['count']} of {jobs} jobs were run")
        return _speed(name, jobs, told["seconds"], told["cpu"])

    def _single(self, weight: int) -> list[Latency]:
        """``weight``: the steps that each is for the progress, as it takes about the time of so many others."""
        confirmed, started = [], []
        with self._worker(self._tasks.alone.queue) as process:
            # The first one waits for the worker to start, and counts for nothing.
            for number in range(SAMPLES + 1):
                # Uneven pauses: even ones could fall in step with a poll.
                time.sleep(random.uniform(0.5, 1.5) * _PAUSE)
                begin = time.monotonic()
                self._tasks.alone.enqueue(number, TEXT)
                end = time.monotonic()
                at = _heard(process)["at"]
                if number > 0:
                    confirmed.append(end - begin)
                    started.append(at - begin)
                    self._progress("one at a time", weight)
        return [_latency("until it is confirmed", confirmed), _latency("until its handler starts", started)]

    @contextmanager
    def _worker(self, queue: str, *mode: str) -> Iterator[subprocess.Popen[str]]:
        """A worker process, ended at the end."""
        command = [sys.executable, "-m", "postroom.bench.worker", self._name, queue, *mode]
        with subprocess.Popen(
            command,
            env={**os.environ, "POSTROOM_BROKER": self._app.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C must reach only this process, which ends the other.
            start_new_session=True,
        ) as process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise


def _heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise PostroomError(f"the worker process ended with {process.wait()}; its own words are above")
    told: dict[str, Any] = json.loads(line)
    return told


def _speed(name: str, jobs: int, wall: float, cpu: float) -> Speed:
    return Speed(name, jobs, round(jobs / wall, 1), round(cpu / jobs * 1e6, 1))


def _latency(name: str, seconds: list[float]) -> Latency:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] for share in (0.50, 0.99))
    return Latency(name, round(p50 * 1000, 2), round(p99 * 1000, 2))


def _nothing() -> None:
    """Only workers run handlers."""
