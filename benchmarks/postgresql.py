"""PostgreSQL: a whole worker and a producer beside a hand-written loop on two clients.

``python -m benchmarks.postgresql [messages]`` starts a server of its own, which syncs every commit.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
from services.postgresql import PostgreSQLServer

from benchmarks import producing, worker
from benchmarks.child import Child, run, run_together
from benchmarks.pulse import rate
from benchmarks.redis import BATCH, BODY, _measured, _told

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

    return _measured(main, count)


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

    return _measured(main, count)


def psycopg_send(url: str, count: int) -> dict[str, float]:
    """The same by psycopg."""

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            for _ in range(count // BATCH):
                await connection.execute(_INSERT.format("%b"), [[BODY] * BATCH])

    return _measured(main, count)


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

    return _measured(main, count)


async def _prepare(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


def main(count: int) -> None:
    server = PostgreSQLServer(Path(tempfile.mkdtemp(prefix="postroom-postgresql-")))
    server.start()
    url: Any = f"{server.url}?migrate=auto"
    try:
        for name, send, take in (("asyncpg", asyncpg_send, asyncpg_take), ("psycopg", psycopg_send, psycopg_take)):
            asyncio.run(_prepare(server.url, CREATE))
            for what, function in (("insert", send), ("SKIP LOCKED loop", take)):
                (found,) = run_together([Child(function, url=server.url, count=count)])
                _told(f"raw: {name}, {what}, batches of {BATCH}", found["cpu"], found["rate"])
        for processes in (1, 2):
            sent = run(producing.enqueue, broker=url, task="noop", count=count)
            if processes == 1:
                print("postroom: enqueue_many", sent)
            results = run_together([Child(worker.drain, broker=url, queue="quick") for _ in range(processes)])
            assert sum(result["count"] for result in results) == count
            cpu = sum(result["cpu"] for result in results) / count * 1e6
            _told(f"postroom: worker, {processes} process(es)", cpu, rate(results))
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.postgresql

    benchmarks.postgresql.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
