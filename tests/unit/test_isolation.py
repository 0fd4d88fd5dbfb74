"""A child process that is kept ready."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from postroom import App
from postroom.broker.base import Ack, Delivery, Release
from postroom.message import Message, Progress
from postroom.worker import isolation
from postroom.worker.isolation import Child, ChildLost, ChildPool
from postroom.worker.work import Work
from tests.conftest import wait_until

SOURCE = """
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from postroom import INJECTED, App, Context

app = App("memory://")
opened = Path(__file__).with_name("opened")
may_tell = Path(__file__).with_name("may_tell")
told = Path(__file__).with_name("told")


@app.lifespan
def life() -> Iterator[None]:
    with opened.open("a") as file:
        file.write("opened\\n")
    yield


@app.task(name="work", isolation="process")
def work(ctx: Context = INJECTED) -> int:
    threading.Thread(target=tell, args=(ctx,), daemon=True).start()
    return os.getpid()


def tell(ctx: Context) -> None:
    while not may_tell.exists():
        time.sleep(0.01)
    ctx.progress(0.5)
    ctx.progress(0.6)
    told.touch()
"""

TALKING = """
import threading

from postroom import INJECTED, App, Context

app = App("memory://")


@app.task(name="work", isolation="process")
def work(ctx: Context = INJECTED) -> str:
    threading.Thread(target=tell, args=(ctx,), daemon=True).start()
    return "x" * 200_000


def tell(ctx: Context) -> None:
    for _ in range(2_000):
        ctx.progress(0.5)
"""


def test_a_child_opens_nothing_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept_ready.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    opened = tmp_path / "opened"

    async def scenario() -> None:
        child = Child("kept_ready", "app")
        try:
            await child.start()
            assert not opened.exists()
            await child.ask()
            await child.ask()
            assert opened.read_text() == "opened\n"
        finally:
            child.close()

    asyncio.run(scenario())


def test_a_message_is_not_charged_for_a_child_that_is_dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: one that was killed a moment ago is alive as far as the system tells."""
    (tmp_path / "dying_child.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("dying_child").app

    async def scenario() -> None:
        children = ChildPool("dying_child", "app", 1, spare=False)
        pids = []
        try:
            for _ in range(5):
                outcome = await children.run(_work(app), lambda _: None, lambda *_: None)
                assert isinstance(outcome, Ack)
                pids.append(int(outcome.result or 0))
                os.kill(pids[-1], signal.SIGKILL)
        finally:
            await children.close()
        assert len(set(pids)) == 5

    asyncio.run(scenario())
    app.close()


def test_what_an_earlier_handler_still_tells_is_not_told_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling_child.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("telling_child").app
    reports: list[Progress] = []

    async def run(children: ChildPool) -> int:
        outcome = await children.run(_work(app), lambda _: None, lambda _, progress: reports.append(progress))
        assert isinstance(outcome, Ack)
        return int(outcome.result or 0)

    async def scenario() -> None:
        children = ChildPool("telling_child", "app", 1, spare=False)
        try:
            first = await run(children)
            (tmp_path / "may_tell").touch()
            await asyncio.to_thread(wait_until, (tmp_path / "told").exists, "it has told")
            (tmp_path / "may_tell").unlink()
            assert await run(children) == first
        finally:
            await children.close()
        assert not reports

    asyncio.run(scenario())
    app.close()


def test_a_long_result_is_whole_whatever_a_thread_tells_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talking_child.py").write_text(TALKING)
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("talking_child").app

    async def scenario() -> None:
        children = ChildPool("talking_child", "app", 1, spare=False)
        try:
            for _ in range(10):
                outcome = await children.run(_work(app), lambda _: None, lambda *_: None)
                assert isinstance(outcome, Ack)
                assert outcome.result == b'"' + b"x" * 200_000 + b'"'
        finally:
            await children.close()

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())
    app.close()


def test_a_child_that_cannot_import_the_app_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_app.py").write_text("raise SystemExit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)

    async def scenario() -> None:
        child = Child("broken_app", "app")
        try:
            with pytest.raises(ChildLost, match="exit code 7"):
                await child.start()
        finally:
            child.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("lacking", ["processes", "files"])
def test_what_the_system_refuses_gives_the_message_back(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C2: else it would be held, and its lease renewed, for as long as the worker lives."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, f"no more {lacking}")

    target = (isolation._spawn.Process, "start") if lacking == "processes" else (isolation._spawn, "Pipe")
    monkeypatch.setattr(*target, refuse)
    app = App("memory://")

    @app.task(name="work", isolation="process")
    def work() -> None:
        raise AssertionError

    async def scenario() -> object:
        children = ChildPool("any", "app", 2, spare=False)
        try:
            return await children.run(_work(app), lambda _: None, lambda *_: None)
        finally:
            await children.close()

    assert asyncio.run(scenario()) == Release(isolation.BROKEN_START_DELAY)
    app.close()


def test_a_spare_is_kept_only_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept_ready.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)

    async def started(*, spare: bool) -> int:
        children = ChildPool("kept_ready", "app", 2, spare=spare)
        before = len(asyncio.all_tasks())
        children.prepare()
        children.prepare()
        try:
            return len(asyncio.all_tasks()) - before
        finally:
            await children.close()

    assert asyncio.run(started(spare=True)) == 1
    assert asyncio.run(started(spare=False)) == 0


def _work(app: App) -> Work:
    """The first attempt of a message for the task ``work``."""
    message = Message(id="m", topic="default", name="work", body=b"{}")
    handler = app.topology.handler("default", "work")
    assert handler is not None
    delivery = Delivery(message=message, subscription="default", attempt=1)
    return Work(delivery, handler, cast("Any", None), 0.0, lambda *_: None)
