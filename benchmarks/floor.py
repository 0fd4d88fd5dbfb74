"""The floor: the least that durable jobs on SQLite cost, in raw SQL without any framework.

The same durability and the same row as Postroom keeps: WAL, ``synchronous=FULL``, one visibility column, a lease
token that fences the settle, the status kept. Batches of 250 are claimed and settled in one transaction; arguments
are decoded by msgspec, and each message runs as an asyncio task of its own.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Literal

import apsw
import msgspec

from benchmarks.child import await_go, cpu_seconds
from benchmarks.pulse import pulse

Driver = Literal["apsw", "sqlite3"]
"""``apsw`` is the quicker way to SQLite, and so the floor; ``sqlite3`` is the one in the standard library."""

CLAIM_BATCH = 250
INSERT_BATCH = 500
LEASE = 30.0

_READY, _RUNNING, _SUCCEEDED = 0, 1, 2

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS message (
  seq INTEGER PRIMARY KEY, subscription INTEGER NOT NULL, priority INTEGER NOT NULL, visible_at REAL,
  lease INTEGER NOT NULL, state INTEGER NOT NULL, attempt INTEGER NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL,
  body BLOB, created_at REAL NOT NULL, started_at REAL, finished_at REAL
)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS message_id ON message (id)",
    "CREATE INDEX IF NOT EXISTS message_ready ON message (subscription, priority, visible_at) "
    "WHERE visible_at IS NOT NULL",
)

_INSERT = "INSERT INTO message VALUES (NULL, 1, 0, ?, 0, 0, 0, ?, ?, ?, ?, NULL, NULL)"

_CLAIM = f"""
UPDATE message SET visible_at = ?, lease = ?, state = {_RUNNING}, attempt = attempt + 1, started_at = ?
WHERE seq IN (
  SELECT seq FROM message WHERE subscription = 1 AND priority = 0 AND visible_at <= ? ORDER BY visible_at LIMIT ?
) RETURNING seq, id, attempt, body
"""

_SETTLE = f"""
UPDATE message SET visible_at = NULL, lease = 0, state = {_SUCCEEDED}, body = NULL, finished_at = ?
WHERE seq = ? AND lease = ?
"""


class Arguments(msgspec.Struct):
    number: int
    text: str


async def noop(number: int, text: str) -> None:
    pulse.note()


def connect(path: str, driver: Driver = "apsw") -> Any:
    """A connection to a file with the table; ``apsw`` and ``sqlite3`` are used alike from here on."""
    connection: Any
    if driver == "apsw":
        connection = apsw.Connection(path)
        # Short even waits: those of SQLite's own handler grow, and two processes share the lock badly.
        connection.set_busy_handler(_wait)
    else:
        connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=4000"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    with _immediate(connection):
        for statement in _SCHEMA:
            connection.execute(statement)
    return connection


def insert_one(connection: Any, body: bytes) -> str:
    """One row in a transaction of its own. Returns its id."""
    now = time.time()
    message_id = os.urandom(16).hex()
    connection.execute(_INSERT, (now, message_id, "bare", body, now))
    return message_id


def enqueue(path: str, count: int, driver: Driver = "apsw") -> dict[str, Any]:
    """In a child: insert ``count`` encoded calls. Returns CPU and wall seconds."""
    connection = connect(path, driver)
    prefix = f"{time.time_ns():016x}"
    cpu, begin = cpu_seconds(), time.monotonic()
    for start in range(0, count, INSERT_BATCH):
        with _immediate(connection):
            connection.executemany(_INSERT, _rows(prefix, start, min(start + INSERT_BATCH, count)))
    return {"cpu": cpu_seconds() - cpu, "wall": time.monotonic() - begin}


def _rows(prefix: str, start: int, end: int) -> list[tuple[Any, ...]]:
    now = time.time()
    encode = msgspec.json.Encoder().encode
    return [
        (now, f"{prefix}{number:016x}", "noop", encode(Arguments(number, "some text")), now)
        for number in range(start, end)
    ]


def drain(path: str, driver: Driver = "apsw") -> dict[str, Any]:
    """In a child: run all messages. Returns CPU seconds and when the handlers ran."""
    connection = connect(path, driver)
    await_go()
    cpu = cpu_seconds()
    asyncio.run(_drain(connection))
    return {"cpu": cpu_seconds() - cpu, **pulse.times()}


async def _drain(connection: Any) -> None:
    decode: Callable[[Any], Arguments] = msgspec.json.Decoder(Arguments).decode
    loop = asyncio.get_running_loop()
    lease = os.getpid() << 32
    batch: list[Any] = []
    while True:
        now = time.time()
        with _immediate(connection):
            connection.executemany(_SETTLE, [(now, row[0], lease) for row in batch])
            lease += 1
            batch = connection.execute(_CLAIM, (now + LEASE, lease, now, now, CLAIM_BATCH)).fetchall()
        if not batch:
            return
        tasks = [loop.create_task(noop(**msgspec.structs.asdict(decode(row[3])))) for row in batch]
        for task in tasks:
            await task


class _immediate:
    """A transaction that takes the write lock first: one that must upgrade later fails when another has written."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _wait(tries: int) -> bool:
    time.sleep(0.0005)
    return tries < 60_000
