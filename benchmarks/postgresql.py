"""PostgreSQL: a whole worker and a producer beside a hand-written loop on two clients.

``python -m benchmarks.postgresql [messages]`` starts a server of its own, which syncs every commit.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import asyncpg
import psycopg
from services.postgresql import PostgreSQLServer

from benchmarks.beside import BODY, measured, show_loop, show_workers

BATCH = 100
CREATE = """
DROP TABLE IF EXISTS raw;
CREATE TABLE raw (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body bytea NOT NULL, until float8);
"""
_INSERT = "INSERT INTO raw (body) SELECT unnest({}::bytea[])"
_CLAIM = """
UPDATE raw SET until = extract(epoch FROM clock_timestamp()) + 30 WHERE id IN (
    SELECT id FROM raw WHERE until IS NULL OR until < extract(epoch FROM clock_timestamp())
    ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED
) RETURNING id, body
"""
_DELETE = "DELETE FROM raw WHERE id = ANY ({}::bigint[])"


async def _handle(body: bytes) -> None:
    assert json.loads(body)


def asyncpg_send(url: str, count: int) -> dict[str, float]:
    """In a child: inserts of whole batches."""

    async def main() -> None:
        connection = await asyncpg.connect(url)
        for _ in range(count // BATCH):
            await connection.execute(_INSERT.format("$1"), [BODY] * BATCH)
        await connection.close()

    return measured(lambda: asyncio.run(main()), count)


def asyncpg_take(url: str, count: int) -> dict[str, float]:
    """In a child: claim a batch with a lease, a coroutine for each message, delete the batch."""

    async def main() -> None:
        done = 0
        connection = await asyncpg.connect(url)
        while done < count:
            found = await connection.fetch(_CLAIM)
            for _, body in found:
                await _handle(body)
            await connection.execute(_DELETE.format("$1"), [row[0] for row in found])
            done += len(found)
        await connection.close()

    return measured(lambda: asyncio.run(main()), count)


def psycopg_send(url: str, count: int) -> dict[str, float]:
    """The same by psycopg."""

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            for _ in range(count // BATCH):
                await connection.execute(_INSERT.format("%b"), [[BODY] * BATCH])

    return measured(lambda: asyncio.run(main()), count)


def psycopg_take(url: str, count: int) -> dict[str, float]:
    """The same by psycopg."""

    async def main() -> None:
        done = 0
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while done < count:
                found = await (await connection.execute(_CLAIM, binary=True)).fetchall()
                for _, body in found:
                    await _handle(body)
                await connection.execute(_DELETE.format("%b"), [[row[0] for row in found]])
                done += len(found)

    return measured(lambda: asyncio.run(main()), count)


async def _prepare(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


def main(count: int) -> None:
    server = PostgreSQLServer(Path(tempfile.mkdtemp(prefix="postroom-postgresql-")))
    server.start()
    try:
        for name, send, take in (("asyncpg", asyncpg_send, asyncpg_take), ("psycopg", psycopg_send, psycopg_take)):
            asyncio.run(_prepare(server.url, CREATE))
            show_loop(f"{name}, insert, batches of {BATCH}", send, count, url=server.url)
            show_loop(f"{name}, SKIP LOCKED loop of {BATCH}", take, count, url=server.url)
        show_workers(f"{server.url}?migrate=auto", count)
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.postgresql

    benchmarks.postgresql.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
