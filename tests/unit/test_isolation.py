"""A child process that is kept ready."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from postroom.worker.isolation import Child, ChildLost, ChildPool

SOURCE = """
from collections.abc import Iterator
from pathlib import Path

from postroom import App

app = App("memory://")
opened = Path(__file__).with_name("opened")


@app.lifespan
def life() -> Iterator[None]:
    with opened.open("a") as file:
        file.write("opened\\n")
    yield
"""


def test_a_child_opens_nothing_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept_ready.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    opened = tmp_path / "opened"

    async def scenario() -> None:
        child = Child("kept_ready", "app")
        try:
            await child.start()
            assert child.is_alive
            assert not opened.exists()
            await child.open()
            await child.open()
            assert opened.read_text() == "opened\n"
        finally:
            child.close()

    asyncio.run(scenario())


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
