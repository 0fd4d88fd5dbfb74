"""The app that is measured: tasks that do nothing, on the broker named by ``POSTROOM_BROKER``."""

from __future__ import annotations

import time

from benchmarks.pulse import pulse
from postroom import App

app = App()

starts: dict[int, float] = {}
"""When :func:`stamp` started with each number, by the clock that all processes of a machine share."""


@app.task(queue="quick")
async def noop(number: int, text: str) -> None:
    pulse.note()


@app.task(queue="threads")
def noop_in_thread(number: int, text: str) -> None:
    pulse.note()


@app.task(queue="stamps")
async def stamp(number: int) -> None:
    starts[number] = time.monotonic()
