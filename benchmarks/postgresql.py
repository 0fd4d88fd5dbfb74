"""PostgreSQL: a whole worker and a producer beside a hand-written loop on two clients, and beside other libraries.

``python -m benchmarks.postgresql [messages]`` starts a server of its own, which syncs every commit. Procrastinate and
PGQueuer are measured too if an interpreter that has them is named: ``PEERS=/path/to/venv/bin/python``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
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


def peers(url: str, count: int) -> None:
    """Other libraries, each by its own quickest documented way; two processes, as many jobs."""
    python = os.environ.get("PEERS")
    if python is None:
        print("PEERS names no interpreter: Procrastinate and PGQueuer are left out")
        return
    for library in ("procrastinate", "pgqueuer"):
        # Procrastinate takes one at a time: fewer are enough to know its pace.
        jobs = count // 10 if library == "procrastinate" else count
        command = [python, str(Path(__file__).with_name("postgresql_peers.py")), library, url, str(jobs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout.strip() if done.returncode == 0 else f"{library}: {done.stderr[-600:]}", flush=True)


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
        peers(server.url, count)
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.postgresql

    benchmarks.postgresql.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
