"""A disk that fails for a moment: what goes on in the background survives it, quietly."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqlite import SQLiteBroker
from postroom.broker.sqlite.watch import POLL, Watch
from postroom.errors import BrokerUnavailable
from postroom.message import Message, new_id
from postroom.testing.clock import ManualClock

LEASE = 30.0


def test_watching_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it polls: one look that fails must not be the last."""
    monkeypatch.setattr(Watch, "_watch", lambda *_: False)
    versions = iter([1, BrokerUnavailable("the disk fails"), *range(2, 1_000)])
    changes = 0

    def version() -> int:
        found = next(versions)
        if isinstance(found, Exception):
            raise found
        return found

    async def act() -> None:
        def changed() -> None:
            nonlocal changes
            changes += 1
            if changes == 3:
                enough.set()

        enough = asyncio.Event()
        watch = Watch(tmp_path / "bell", tmp_path / "log", changed, lambda: True, version)
        async with asyncio.timeout(200 * POLL):
            await enough.wait()
        watch.close()

    asyncio.run(act())


def test_what_cannot_be_given_back_comes_by_its_lease(tmp_path: Path) -> None:
    async def act() -> list[Any]:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        clock = ManualClock()
        broker = SQLiteBroker(f"sqlite:///{tmp_path}/file.db", clock=clock)
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        sent = Message(id=new_id(), topic="q", name="work", body=b"{}", created_at=clock.now())
        await broker.publish([sent])
        consumer: Any = await broker.consume("q", lease=LEASE)
        receiving = asyncio.create_task(consumer.receive(1, None))
        while not consumer._held:  # noqa: ASYNC110 -- between the commit and the answer
            await asyncio.sleep(0)
        broker.engine.connection.execute("PRAGMA query_only = ON")
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        await clock.settle()
        broker.engine.connection.execute("PRAGMA query_only = OFF")
        del receiving
        gc.collect()
        await clock.advance(LEASE)
        (again,) = await consumer.receive(1, 0.0)
        assert (again.message.id, again.attempt) == (sent.id, 1)
        await broker.close()
        return complaints

    assert asyncio.run(act()) == []
