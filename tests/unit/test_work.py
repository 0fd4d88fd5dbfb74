"""What a worker holds for each message: cheap to make, and gone when it is done."""

from __future__ import annotations

import gc
from typing import Any

from postroom.broker.base import Delivery
from postroom.config import HandlerOptions
from postroom.handler import TaskHandler
from postroom.message import Message, Progress
from postroom.worker.work import Work


def make_work(report: Any = None) -> Work:
    def function() -> None: ...

    handler = TaskHandler(function, name="f", subscription="q", options=HandlerOptions(), resources=())
    delivery = Delivery(message=Message(id="1", topic="q", name="f", body=b"{}"), subscription="q", attempt=2)
    return Work(delivery, handler, None, 0.0, report)  # type: ignore[arg-type]  # settled by nobody


def test_a_finished_work_is_no_garbage() -> None:
    """Left to the cyclic collector, works would double what a job costs."""
    work = make_work()
    work.start(None)
    gc.collect()
    gc.disable()
    try:
        del work
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_context_is_made_once_and_reports_for_its_work() -> None:
    reports: list[tuple[Work, Progress]] = []
    work = make_work(lambda work, progress: reports.append((work, progress)))
    assert work.context is work.context
    assert (work.context.attempt, work.context.max_attempts, work.context.cancelled) == (2, 5, False)
    work.context.progress(0.5, "half")
    assert reports == [(work, Progress(0.5, "half"))]


def test_an_interruption_is_seen_in_the_context_whenever_that_is_made() -> None:
    before, after = make_work(), make_work()
    assert not before.context.cancelled
    before.interrupt("timeout")
    after.interrupt("timeout")
    assert before.context.cancelled
    assert after.context.cancelled


def test_it_is_interrupted_once_whether_it_has_started_or_not() -> None:
    for started_first in (True, False):
        interrupted: list[Work] = []
        work = make_work()
        if started_first:
            work.start(interrupted.append)
        work.interrupt("cancelled")
        work.interrupt("timeout")
        if not started_first:
            work.start(interrupted.append)
        assert interrupted == [work]
        assert work.why == "cancelled"
