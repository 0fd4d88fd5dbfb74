"""Other job queues on PostgreSQL, each as its own documentation sets it up. Run by interpreters that have them.

Nothing here may import Postroom: those interpreters do not have it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from typing import Any

from benchmarks.child import await_go, cpu_seconds
from benchmarks.pulse import pulse

ENQUEUE_BATCH = 1000
PROCRASTINATE_CONCURRENCY = 10
PGQUEUER_BATCH = 100
OBAN_LIMIT = 50
_QUIET = 1.0
"""Seconds without a job after which a queue is taken to be empty by those that have no reliable way to drain it."""
_FIRST = 10.0
"""Seconds for the first job."""


def versions(names: list[str]) -> dict[str, str]:
    """Those of the named packages that this interpreter has."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _measured(work: Any) -> dict[str, Any]:
    await_go()
    cpu = cpu_seconds()
    asyncio.run(work())
    return {"cpu": cpu_seconds() - cpu, **pulse.times()}


async def _quiet() -> None:
    begin = time.monotonic()
    while time.monotonic() < (pulse.last + _QUIET if pulse.count else begin + _FIRST):  # noqa: ASYNC110 -- no event
        await asyncio.sleep(0.1)


def pgqueuer_enqueue(url: str, count: int, install: bool) -> None:
    import asyncpg
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    async def main() -> None:
        connection = await asyncpg.connect(url)
        queries = Queries(AsyncpgDriver(connection))
        if install:
            await queries.install()
        for start in range(0, count, ENQUEUE_BATCH):
            bodies = [b'{"n":1}'] * min(ENQUEUE_BATCH, count - start)
            await queries.enqueue(["noop"] * len(bodies), bodies, [0] * len(bodies))
        await connection.close()

    asyncio.run(main())


def pgqueuer_drain(url: str) -> dict[str, Any]:
    import asyncpg
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver

    async def main() -> None:
        connection = await asyncpg.connect(url)
        queuer = PgQueuer(AsyncpgDriver(connection))

        @queuer.entrypoint("noop")
        async def noop(job: Any) -> None:
            pulse.note()

        running = asyncio.ensure_future(queuer.qm.run(batch_size=PGQUEUER_BATCH))
        await _quiet()
        queuer.shutdown.set()
        await running
        await connection.close()

    return _measured(main)


def _procrastinate(url: str) -> tuple[Any, Any]:
    import procrastinate

    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))

    @app.task(name="noop")
    async def noop(n: int) -> None:
        pulse.note()

    return app, noop


def procrastinate_enqueue(url: str, count: int, install: bool) -> None:
    app, noop = _procrastinate(url)

    async def main() -> None:
        async with app.open_async():
            if install:
                await app.schema_manager.apply_schema_async()
            for start in range(0, count, ENQUEUE_BATCH):
                await noop.batch_defer_async(*({"n": 1} for _ in range(min(ENQUEUE_BATCH, count - start))))

    asyncio.run(main())


def procrastinate_drain(url: str) -> dict[str, Any]:
    app, _ = _procrastinate(url)

    async def main() -> None:
        async with app.open_async():
            await app.run_worker_async(wait=False, concurrency=PROCRASTINATE_CONCURRENCY)

    return _measured(main)


def _oban() -> Any:
    import oban

    @oban.job(queue="default")
    async def noop(n: int) -> None:
        pulse.note()

    return noop


def oban_enqueue(url: str, count: int, install: bool) -> None:
    from oban import Oban
    from oban.schema import install as install_schema
    from psycopg_pool import AsyncConnectionPool

    noop = _oban()

    async def main() -> None:
        async with AsyncConnectionPool(url, open=False) as pool:
            if install:
                await install_schema(pool)
            async with Oban(pool=pool) as client:
                for start in range(0, count, ENQUEUE_BATCH):
                    await client.enqueue_many([noop.new(1) for _ in range(min(ENQUEUE_BATCH, count - start))])

    asyncio.run(main())


def oban_drain(url: str) -> dict[str, Any]:
    from oban import Oban
    from psycopg_pool import AsyncConnectionPool

    _oban()

    async def main() -> None:
        async with AsyncConnectionPool(url, open=False) as pool, Oban(pool=pool, queues={"default": OBAN_LIMIT}):
            await _quiet()

    return _measured(main)
