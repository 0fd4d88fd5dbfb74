"""The worker that is measured, a process of its own: ``python -m postroom.bench.worker NAME QUEUE [drain]``.

It says what happens in lines of JSON. The broker is that of ``POSTROOM_BROKER``: its URL may hold a password.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any

from postroom import App
from postroom.bench.tasks import define
from postroom.worker.process import Worker, WorkerOptions

_REPORT = 0.1
"""Seconds between reports of how far it is."""


class Pulse:
    """How many handlers have run, and when the first and the last: speed without start and stop."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.last = 0.0
        self._mutex = threading.Lock()

    def note(self) -> None:
        # From several threads at once: an addition that is interrupted would lose a count.
        with self._mutex:
            self.last = time.monotonic()
            self.count += 1
            if self.count == 1:
                self.first = self.last


def drain(name: str, queue: str) -> None:
    """Work until nothing is left, then tell the whole."""
    pulse, done = Pulse(), threading.Event()

    def report() -> None:
        while not done.wait(_REPORT):
            say(count=pulse.count)

    reporting = threading.Thread(target=report)
    reporting.start()
    used = time.process_time()
    try:
        with App() as app:
            define(app, name, pulse.note)
            app.run_worker(queues=[queue], drain=True)
    finally:
        done.set()
        reporting.join()
    used = time.process_time() - used
    say(count=pulse.count, seconds=pulse.last - pulse.first, cpu=used)


def wait(name: str, queue: str) -> None:
    """Work until standard input ends, as it does when whoever measures dies; tell the time of each start."""
    with App() as app:
        define(app, name, lambda: say(at=time.monotonic()))
        worker = Worker(app, WorkerOptions(queues=[queue]))

        def stop_at_the_end() -> None:
            sys.stdin.read()
            worker.stop()

        threading.Thread(target=stop_at_the_end, daemon=True).start()
        asyncio.run(worker.run())


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    if sys.argv[3:] == ["drain"]:
        drain(sys.argv[1], sys.argv[2])
    else:
        wait(sys.argv[1], sys.argv[2])
