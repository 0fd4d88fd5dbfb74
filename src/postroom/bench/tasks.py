"""The tasks that are measured; producer and worker define the same ones, each on its own app."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from postroom import App
from postroom.producer.task import AsyncTask, SyncTask

TEXT = "a name, an address, whatever jobs carry"


class Tasks(NamedTuple):
    """One task a queue."""

    on_the_loop: AsyncTask[[int, str], None]
    in_a_thread: SyncTask[[int, str], None]
    alone: AsyncTask[[int, str], None]
    """Enqueued one at a time, while the worker has nothing else to do."""

    @property
    def queues(self) -> list[str]:
        return [task.queue for task in self]


def define(app: App, name: str, note: Callable[[], None]) -> Tasks:
    """``name`` begins the names of the queues; ``note`` is all that the handlers do."""

    @app.task(queue=f"{name}-loop")
    async def on_the_loop(number: int, text: str) -> None:
        note()

    @app.task(queue=f"{name}-thread")
    def in_a_thread(number: int, text: str) -> None:
        note()

    @app.task(queue=f"{name}-alone")
    async def alone(number: int, text: str) -> None:
        note()

    return Tasks(on_the_loop, in_a_thread, alone)
