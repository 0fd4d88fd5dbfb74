"""How often a worker looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from postroom import App


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "after"), [(700, 20_000), (50_000, 50_000), (0, 0)])
def test_a_worker_looks_for_garbage_no_more_often_than_asked(before: int, after: int) -> None:
    app = App("memory://")

    @app.task
    def nothing() -> None: ...

    gc.set_threshold(before, 10, 10)
    app.run_worker(drain=True)
    assert gc.get_threshold() == (after, 10, 10)
    app.close()
