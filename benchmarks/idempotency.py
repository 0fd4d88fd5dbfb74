"""``ctx.once`` in a handler that commits one UPDATE, for each way to a database: what the mark costs.

``python -m benchmarks.idempotency [commits]`` starts servers of its own. Both kinds of commit take turns, so that
whatever else the machine does meets both. Exit code 1 if the mark adds more than 35 % to one of them.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import apsw
import asyncpg
import psycopg
import sqlalchemy as sa
from services.mariadb import MariaDBServer
from services.postgresql import PostgreSQLServer
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
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
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE account (amount BIGINT)"))
        connection.execute(sa.text("INSERT INTO account VALUES (0)"))
        create_inbox(connection)
    return engine


def with_coroutines(url: str) -> AsyncEngine:
    return create_async_engine(url, poolclass=sa.pool.NullPool)


async def ways(postgresql: str, mariadb: str, folder: Path, stack: AsyncExitStack) -> dict[str, Commit]:
    """Every way to a database, connected until ``stack`` is closed."""

    def kept(connection: Any) -> Any:
        stack.push_async_callback(closed, connection)
        return connection

    lite = set_up(f"sqlite:///{folder}/a.db")
    post = set_up(postgresql.replace("postgresql:", "postgresql+psycopg:"))
    maria = set_up(mariadb.replace("mysql:", "mysql+pymysql:"))
    post_coroutines = with_coroutines(postgresql.replace("postgresql:", "postgresql+asyncpg:"))
    maria_coroutines = with_coroutines(mariadb.replace("mysql:", "mysql+aiomysql:"))
    pay = sa.text(PAY)
    return {
        "sqlite3": sqlite_commit(kept(sqlite3.connect(folder / "a.db", isolation_level=None))),
        "apsw": sqlite_commit(kept(apsw.Connection(str(folder / "a.db")))),
        "SQLAlchemy, SQLite": plain_commit(kept(lite.connect()), pay),
        "psycopg": plain_commit(kept(psycopg.connect(postgresql))),
        "psycopg, async": async_commit(kept(await psycopg.AsyncConnection.connect(postgresql))),
        "asyncpg": asyncpg_commit(kept(await asyncpg.connect(postgresql))),
        "SQLAlchemy, PostgreSQL": plain_commit(kept(post.connect()), pay),
        "SQLAlchemy session, PostgreSQL": plain_commit(kept(Session(post)), pay),
        "SQLAlchemy async session, PostgreSQL": async_commit(kept(AsyncSession(post_coroutines)), pay),
        "SQLAlchemy, MariaDB": plain_commit(kept(maria.connect()), pay),
        "SQLAlchemy async session, MariaDB": async_commit(kept(AsyncSession(maria_coroutines)), pay),
    }


async def closed(connection: Any) -> None:
    done = connection.close()
    if inspect.isawaitable(done):
        await done


class Cost(NamedTuple):
    """Of one commit, in milliseconds: the median of the time it took, and what this process computed for it."""

    wall: float
    processor: float


async def measure(commit: Commit, count: int) -> tuple[Cost, Cost]:
    """Without and with the mark."""
    walls: tuple[list[float], list[float]] = ([], [])
    processor = [0.0, 0.0]
    for number in range(2 * (count + 20)):
        marked = number % 2
        ctx = context() if marked else None
        begin, computed = time.perf_counter(), time.process_time()
        await commit(ctx)
        if number >= 40:
            walls[marked].append((time.perf_counter() - begin) * 1000)
            processor[marked] += (time.process_time() - computed) * 1000 / count
    return Cost(median(walls[0]), processor[0]), Cost(median(walls[1]), processor[1])


async def main(count: int) -> int:
    missed = 0
    with tempfile.TemporaryDirectory(prefix="postroom-benchmark-") as folder:
        servers = [PostgreSQLServer(Path(folder, "postgresql")), MariaDBServer(Path(folder, "mariadb"))]
        try:
            for server in servers:
                server.start()
            async with AsyncExitStack() as stack:
                known = await ways(servers[0].url, servers[1].url, Path(folder), stack)
                print(f"{'milliseconds a commit':<38}  without  with mark           processor")
                for name, commit in known.items():
                    plain, marked = await measure(commit, count)
                    added = marked.wall / plain.wall
                    missed += added > TARGET
                    print(
                        f"{name:<38} {plain.wall:8.3f}   {marked.wall:8.3f} {100 * (added - 1):+6.1f} %"
                        f"    {plain.processor:.3f} {marked.processor:.3f}"
                    )
        finally:
            for server in servers:
                server.stop()
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)))
