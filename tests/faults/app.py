"""The app under fault: every start and end of a handler is written to a journal of its process."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from postroom import INJECTED, App, Context, RetryPolicy, create_inbox, exponential

JOURNAL = Path(os.environ["FAULTS_JOURNAL"])
ACCOUNTS = os.environ.get("FAULTS_ACCOUNTS", "")
LEASE = float(os.environ.get("FAULTS_LEASE", "30"))
FAST = RetryPolicy(backoff=exponential(first=0.01, max=0.05))

app = App(os.environ["POSTROOM_BROKER"])

_descriptor = os.open(JOURNAL / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(event: str, ctx: Context, **more: object) -> None:
    """One write a line: a killed process leaves whole lines in the page cache."""
    record = {
        "event": event,
        "id": ctx.job_id,
        "attempt": ctx.attempt,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "t": time.monotonic(),
        **more,
    }
    os.write(_descriptor, json.dumps(record).encode() + b"\n")


@app.task(lease=LEASE)
async def work(pause: float, ctx: Context = INJECTED) -> None:
    note("start", ctx)
    await asyncio.sleep(pause)
    note("end", ctx)


@app.task(queue="threads", lease=LEASE)
def block(pause: float, ctx: Context = INJECTED) -> str:
    note("start", ctx)
    time.sleep(pause)
    note("end", ctx)
    return "done"


@app.task(queue="threads", lease=LEASE)
def linger(ctx: Context = INJECTED) -> None:
    """The first attempt outlasts its worker."""
    note("start", ctx)
    time.sleep(60.0 if ctx.attempt == 1 else 0.02)
    note("end", ctx)


@app.task(queue="mixed", retry=FAST, lease=LEASE)
async def healthy(ctx: Context = INJECTED) -> None:
    note("start", ctx)
    await asyncio.sleep(0.05)
    note("end", ctx)


@app.task(queue="mixed", retry=FAST, lease=LEASE)
async def killer(ctx: Context = INJECTED) -> None:
    note("start", ctx)
    await asyncio.sleep(0.02)
    os._exit(17)


@app.task(queue="isolated", isolation="process", retry=FAST)
def crash(how: str, ctx: Context = INJECTED) -> None:
    note("start", ctx)
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), 9)
    while how == "spin":
        pass
    note("end", ctx)


@app.task(queue="timed", isolation="process", timeout=0.5, retry=RetryPolicy(max_attempts=1))
def spin(ctx: Context = INJECTED) -> None:
    note("start", ctx)
    while True:
        pass


@app.resource
def accounts() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(ACCOUNTS or ":memory:", timeout=30, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, amount INTEGER)")
    create_inbox(connection)
    yield connection
    connection.close()


@app.task(queue="payments", lease=LEASE)
async def pay(amount: int, pause: float = 0.0, ctx: Context = INJECTED, db: sqlite3.Connection = INJECTED) -> None:
    note("start", ctx)
    db.execute("BEGIN IMMEDIATE")
    try:
        ctx.once(db)
        db.execute("UPDATE accounts SET amount = amount - ? WHERE name = 'ann'", (amount,))
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    note("committed", ctx)
    await asyncio.sleep(pause)
    note("end", ctx)
