"""A worker that has given back what waited too long for a slot."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from postroom import App
from postroom.message import Message, new_id
from tests.conftest import wait_until, working


def test_it_fetches_again_once_the_slot_is_free() -> None:
    """C2: two queues had a message at once, and the only slot was taken for longer than it has patience."""
    app = App(f"memory://{uuid4().hex}")
    ended: list[str] = []

    @app.task(queue="a")
    async def first() -> None:
        await asyncio.sleep(1.8)
        ended.append("a")

    @app.task(queue="b")
    async def second() -> None:
        await asyncio.sleep(1.8)
        ended.append("b")

    with app, working(app, concurrency=1):
        first.enqueue()
        wait_until(lambda: len(ended) == 1, "the worker is up", 20.0)
        wait_until(lambda: not any(one.running for one in app.stats()), "it waits again")
        names = {"a": first.name, "b": second.name}
        app.outlet.send([Message(id=new_id(), topic=queue, name=name, body=b"{}") for queue, name in names.items()])
        wait_until(lambda: len(ended) == 3, "both have run", 20.0)
