"""``ctx.once`` in a handler that commits one UPDATE, for each way to a database: what the mark costs.

``python -m benchmarks.idempotency [commits]`` starts servers of its own. Both kinds of commit take turns, so that
whatever else the machine does meets both. Exit code 1 if the mark adds more than 35 % to one of them.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import apsw
import asyncpg
import psycopg
import sqlalchemy as sa
from services.mariadb import MariaDBServer
from services.postgresql import PostgreSQLServer
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from postroom import Context, create_inbox
from postroom.message import Message, new_id

TARGET = 1.35
PAY = "UPDATE account SET amount = amount - 10"

Commit = Callable[[Context | None], Awaitable[None]]


def context() -> Context:
    return Context(Message(id=new_id(), topic="t", name="t", body=b""), "bookkeeping", 1, 5)


def sqlite_commit(connection: Any) -> Commit:
    async def commit(ctx: Context | None) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if ctx is not None:
            ctx.once(connection)
        connection.execute(PAY)
        connection.execute("COMMIT")

    return commit


def plain_commit(connection: Any, pay: Any = PAY) -> Commit:
    async def commit(ctx: Context | None) -> None:
        if ctx is not None:
            ctx.once(connection)
        connection.execute(pay)
        connection.commit()

    return commit


def asyncpg_commit(connection: Any) -> Commit:
    async def commit(ctx: Context | None) -> None:
        async with connection.transaction():
            if ctx is not None:
                await ctx.aonce(connection)
            await connection.execute(PAY)

    return commit


def async_commit(connection: Any, pay: Any = PAY) -> Commit:
    async def commit(ctx: Context | None) -> None:
        if ctx is not None:
            await ctx.aonce(connection)
        await connection.execute(pay)
        await connection.commit()

    return commit


def set_up(url: str) -> sa.Engine:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE account (amount BIGINT)"))
        connection.execute(sa.text("INSERT INTO account VALUES (0)"))
        create_inbox(connection)
    return engine


async def ways(postgresql: str, mariadb: str, folder: Path) -> dict[str, Commit]:
    """Every way to a database, connected."""
    lite = set_up(f"sqlite:///{folder}/a.db")
    post = set_up(postgresql.replace("postgresql:", "postgresql+psycopg:"))
    maria = set_up(mariadb.replace("mysql:", "mysql+pymysql:"))
    coroutines = create_async_engine(postgresql.replace("postgresql:", "postgresql+asyncpg:"))
    pay = sa.text(PAY)
    return {
        "sqlite3": sqlite_commit(sqlite3.connect(folder / "a.db", isolation_level=None)),
        "apsw": sqlite_commit(apsw.Connection(str(folder / "a.db"))),
        "SQLAlchemy, SQLite": plain_commit(lite.connect(), pay),
        "psycopg": plain_commit(psycopg.connect(postgresql)),
        "psycopg, async": async_commit(await psycopg.AsyncConnection.connect(postgresql)),
        "asyncpg": asyncpg_commit(await asyncpg.connect(postgresql)),
        "SQLAlchemy, PostgreSQL": plain_commit(post.connect(), pay),
        "SQLAlchemy session, PostgreSQL": plain_commit(Session(post), pay),
        "SQLAlchemy async session, PostgreSQL": async_commit(AsyncSession(coroutines), pay),
        "SQLAlchemy, MariaDB": plain_commit(maria.connect(), pay),
    }


async def measure(commit: Commit, count: int) -> tuple[float, float]:
    """Milliseconds for one commit, without and with the mark."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * (count + 20)):
        marked = number % 2
        ctx = context() if marked else None
        begin = time.perf_counter()
        await commit(ctx)
        if number >= 40:
            times[marked].append((time.perf_counter() - begin) * 1000)
    return median(times[0]), median(times[1])


async def main(count: int) -> int:
    missed = 0
    with tempfile.TemporaryDirectory(prefix="postroom-benchmark-") as folder:
        servers = [PostgreSQLServer(Path(folder, "postgresql")), MariaDBServer(Path(folder, "mariadb"))]
        try:
            for server in servers:
                server.start()
            for name, commit in (await ways(servers[0].url, servers[1].url, Path(folder))).items():
                without, with_mark = await measure(commit, count)
                missed += with_mark > TARGET * without
                print(f"{name:<38} {without:7.3f} ms {with_mark:7.3f} ms {100 * (with_mark / without - 1):+6.1f} %")
        finally:
            for server in servers:
                server.stop()
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)))
