"""Redis: a whole worker and a producer beside hand-written loops on the same client, same server, same durability.

``python -m benchmarks.redis [messages]`` starts a server of its own, with an append-only file.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis
from services.redis import RedisServer

from benchmarks.beside import BODY, measured, show_latency, show_loop, show_times, show_workers
from benchmarks.child import run

BATCH = 100


def raw_send(url: str, count: int) -> dict[str, float]:
    """In a child: ``XADD`` in pipelines."""

    async def main() -> None:
        async with Redis.from_url(url) as client:
            for _ in range(count // BATCH):
                pipeline = client.pipeline(transaction=False)
                for _ in range(BATCH):
                    pipeline.xadd("raw", {"body": BODY})
                await pipeline.execute()

    return measured(lambda: asyncio.run(main()), count)


def raw_take(url: str, count: int) -> dict[str, float]:
    """In a child: ``XREADGROUP``, a coroutine for each message, then one ``XACK`` and ``XDEL`` for all of them."""

    async def handle(body: bytes) -> None:
        assert body

    async def main() -> None:
        done = 0
        async with Redis.from_url(url) as client:
            await client.xgroup_create("raw", "group", id="0")
            while done < count:
                ((_, entries),) = await client.xreadgroup("group", "one", {"raw": ">"}, count=BATCH)
                for _, fields in entries:
                    await handle(fields[b"body"])
                ids = [entry_id for entry_id, _ in entries]
                pipeline = client.pipeline(transaction=False)
                pipeline.xack("raw", "group", *ids)
                pipeline.xdel("raw", *ids)
                await pipeline.execute()
                done += len(entries)

    return measured(lambda: asyncio.run(main()), count)


def raw_wait(url: str) -> list[float]:
    """In a child: one message at a time to a waiting reader, in milliseconds."""

    async def main() -> list[float]:
        times: list[float] = []
        async with Redis.from_url(url) as reader, Redis.from_url(url) as writer:
            await writer.xgroup_create("wait", "group", id="0", mkstream=True)
            for _ in range(200):
                reading = asyncio.ensure_future(reader.xreadgroup("group", "one", {"wait": ">"}, block=1000))
                await asyncio.sleep(0.02)
                begin = time.perf_counter()
                await writer.xadd("wait", {"body": BODY})
                await reading
                times.append((time.perf_counter() - begin) * 1000)
        return times

    return asyncio.run(main())


def main(count: int) -> None:
    server = RedisServer(Path(tempfile.mkdtemp(prefix="postroom-redis-")), options=("--appendfsync", "everysec"))
    server.start()
    try:
        show_loop("XADD, pipelines of 100", raw_send, count, url=server.url)
        show_loop("XREADGROUP, XACK, XDEL", raw_take, count, url=server.url)
        show_workers(server.url, count)
        show_times("raw: XADD to read", run(raw_wait, url=server.url))
        show_latency(server.url)
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.redis

    benchmarks.redis.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
