"""Handlers for each kind of connection, which pay once. A first attempt stops half-way: there harm is done to it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from postroom import INJECTED, App, Context, RetryPolicy
from tests.transactions import ASYNC, SYNC, database_of, run

BEFORE, AFTER, COMMITTED = STEPS = ("before the mark", "after the effect", "after the commit")
LEASE = 5.0
"""Seconds: more than a loaded machine takes to start all handlers."""
_GIVE_UP = {
    "postgresql": "SET idle_in_transaction_session_timeout = '5s'",
    "mysql": "SET SESSION idle_transaction_timeout = 5",
}
"""The server ends the transaction of a client that has gone silent, and with it its locks; SQLite has no server."""


app = App(os.environ.get("SHOP_BROKER", "memory://"))
_options_of_task: dict[str, Any] = {"lease": LEASE, "retry": RetryPolicy(max_attempts=10_000, backoff=lambda _: 0.5)}


@app.task(**_options_of_task)
def pay(way: str, step: str, ctx: Context = INJECTED) -> int:
    with _ending(way, step, ctx), SYNC[way](way, step) as connection:
        for statement in _before(way, step):
            run(connection, statement)
        while _stops(BEFORE, way, step, ctx):
            time.sleep(0.01)
        ctx.once(connection)
        run(connection, _effect(way, step))
        while _stops(AFTER, way, step, ctx):
            time.sleep(0.01)
    while _stops(COMMITTED, way, step, ctx):
        time.sleep(0.01)
    return os.getpid()


@app.task(**_options_of_task)
async def apay(way: str, step: str, ctx: Context = INJECTED) -> int:
    # The worker cancels it when it finds the lease lost. One that goes on regardless is the worse case.
    return await asyncio.shield(_apay(way, step, ctx))


async def _apay(way: str, step: str, ctx: Context) -> int:
    with _ending(way, step, ctx):
        async with ASYNC[way](way, step) as connection:
            for statement in _before(way, step):
                await run(connection, statement)
            while _stops(BEFORE, way, step, ctx):  # noqa: ASYNC110 -- told across processes
                await asyncio.sleep(0.01)
            await ctx.aonce(connection)
            await run(connection, _effect(way, step))
            while _stops(AFTER, way, step, ctx):  # noqa: ASYNC110 -- told across processes
                await asyncio.sleep(0.01)
    while _stops(COMMITTED, way, step, ctx):  # noqa: ASYNC110 -- told across processes
        await asyncio.sleep(0.01)
    return os.getpid()


@contextmanager
def _ending(way: str, step: str, ctx: Context) -> Iterator[None]:
    try:
        yield
    finally:
        if ctx.attempt == 1:
            try:
                _tell_end(way, step)
            except BaseException:
                # The exception that ends a thread whose lease is lost may strike here; it comes only once.
                _tell_end(way, step)
                raise


def _tell_end(way: str, step: str) -> None:
    (_folder() / f"{way} {step}.ended").touch()


def _before(way: str, step: str) -> list[str]:
    # A look makes a snapshot which is older than the other's commit.
    give_up = _GIVE_UP.get(database_of(way)) if step == AFTER else None
    return [*([give_up] if give_up else []), f"SELECT amount FROM account WHERE name = '{way} {step}'"]


def _effect(way: str, step: str) -> str:
    return f"UPDATE account SET amount = amount - 10 WHERE name = '{way} {step}'"


def _stops(here: str, way: str, step: str, ctx: Context) -> bool:
    """Whether to stay here for now; the file tells that it is here."""
    if here != step or ctx.attempt > 1 or (_folder() / "thawed").exists():
        return False
    (_folder() / f"{way} {step}.there").touch()
    return True


def _folder() -> Path:
    return Path(os.environ["SHOP_FOLDER"])
