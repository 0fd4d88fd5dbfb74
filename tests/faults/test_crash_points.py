"""A kill before every single SQL statement of publish, claim, settle, redrive, declare and close.

Whatever the step, afterwards every message is in exactly one place, nothing that was confirmed is missing, a batch
is stored wholly or not at all, and the rest can be worked off.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from postroom.broker.base import Ack
from postroom.broker.sqlite import SQLiteBroker
from postroom.message import JobState
from tests.faults import crash
from tests.faults.processes import ROOT

MOST_STEPS = 80


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", crash.SCENARIOS)
def test_a_kill_at_every_step(tmp_path: Path, what: str) -> None:
    for step in range(1, MOST_STEPS):
        path = tmp_path / f"{step}.db"
        command = [sys.executable, "-m", "tests.faults.crash", str(path), what, str(step)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        finished = "done" in done.stdout
        assert finished or done.returncode == -9, done.stderr
        asyncio.run(check(path, what, finished))
        if finished:
            assert step > 3, "there were no steps to be killed at"
            return
    pytest.fail(f"more than {MOST_STEPS} steps")


async def check(path: Path, what: str, finished: bool) -> None:
    broker = SQLiteBroker(f"sqlite:///{path}")
    await broker.connect()
    try:
        assert broker.engine.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        await broker.declare(crash.TOPICS, crash.SUBSCRIPTIONS)
        totals = {stats.name: stats.ready + stats.delayed + stats.running for stats in await broker.stats()}
        held = Counter({name: await count(broker, name) for name in totals})
        if what == "publish":
            # One batch to a queue and a topic with two subscriptions: all of it or nothing.
            stored = held["q"] == held["a"] == crash.COUNT and held["b"] == crash.COUNT
            assert stored or not any(held.values())
            assert stored or not finished
        else:
            assert held["a"] == held["b"] == crash.COUNT
        ended = await work_off(broker, "a")
        assert sum(ended.values()) == held["a"]
        await work_off(broker, "q")
        await work_off(broker, "b")
        assert all(
            stats.ready + stats.delayed + stats.running == 0 for stats in await broker.stats() if stats.name != "late"
        )
    finally:
        await broker.close()


async def count(broker: SQLiteBroker, subscription: str) -> int:
    """Records of a subscription, each message once."""
    records = await broker.jobs.search(subscription=subscription, limit=1000)
    assert len({record.id for record in records}) == len(records)
    return len(records)


async def work_off(broker: SQLiteBroker, subscription: str) -> Counter[JobState]:
    """Acknowledge all that comes; returns how the messages ended."""
    consumer = await broker.consume(subscription)
    # What the broker does twice a second by itself; here there are many files to look at.
    await broker._recover_dead()
    while deliveries := await consumer.receive(100, 0):
        await consumer.settle([(delivery, Ack()) for delivery in deliveries])
    await consumer.close()
    return Counter(record.state for record in await broker.jobs.search(subscription=subscription, limit=1000))
