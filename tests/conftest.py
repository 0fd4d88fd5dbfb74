"""What tests of several areas share."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from services.catalogue import NAMES

from postroom import App
from postroom.worker.process import Worker, WorkerOptions


def pytest_configure() -> None:
    # Of what a shell runs in the background it has SIGINT ignored, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a server's adapter mostly wait, so more of them run side by side: modules that bear a server's name."""
    for item in items:
        if any(name in item.path.stem.split("_") for name in NAMES):
            item.add_marker(pytest.mark.server)
        if item.get_closest_marker("timed") is not None:
            item.add_marker(pytest.mark.flaky(reruns=2))
    # Whole files are spread over processes in this order: none that takes minutes may be the last.
    items.sort(key=lambda item: item.path.parent.name not in ("conformance", "faults"))


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh broker of each embedded kind."""
    return f"memory://{uuid4().hex}" if request.param == "memory" else f"sqlite:///{tmp_path}/postroom.db"


@pytest.fixture
def app(url: str) -> Iterator[App]:
    with App(url) as made:
        yield made


@contextmanager
def working(app: App, **options: Any) -> Iterator[Worker]:
    """A worker of ``app`` in a thread; stopped gracefully at the end, and what ended it is raised."""
    worker = Worker(app, WorkerOptions(**options))
    failures: list[BaseException] = []

    def main() -> None:
        try:
            asyncio.run(worker.run())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=main, name="worker")
    thread.start()
    try:
        yield worker
    finally:
        wait_until(lambda: worker.ready or not thread.is_alive(), "the worker started")
        if thread.is_alive():
            worker.stop()
        thread.join(30)
        assert not thread.is_alive(), "the worker did not stop"
        if failures:
            raise failures[0]


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Poll until ``condition()`` is true; returns its value. Fails naming ``what``."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)
    return value
