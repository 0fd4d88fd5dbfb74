"""Redis: a whole worker and a producer beside hand-written loops on the same client, same server, same durability.

``python -m benchmarks.redis [messages]`` starts a server of its own, with an append-only file.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from services.redis import RedisServer

from benchmarks import latency, producing, worker
from benchmarks.child import Child, await_go, cpu_seconds, run, run_together
from benchmarks.pulse import rate

BATCH = 100
BODY = b'{"n":1}'


def raw_send(url: str, count: int) -> dict[str, float]:
    """In a child: ``XADD`` in pipelines."""

    async def main() -> None:
        async with Redis.from_url(url) as client:
            for _ in range(count // BATCH):
                pipeline = client.pipeline(transaction=False)
                for _ in range(BATCH):
                    pipeline.xadd("raw", {"body": BODY})
                await pipeline.execute()

    return _measured(main, count)


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

    return _measured(main, count)


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


def _measured(main: Any, count: int) -> dict[str, float]:
    await_go()
    wall, cpu = time.perf_counter(), cpu_seconds()
    asyncio.run(main())
    wall = time.perf_counter() - wall
    return {"cpu": (cpu_seconds() - cpu) / count * 1e6, "rate": count / wall}


def _told(what: str, cpu: float, each: float) -> None:
    print(f"{what:42} {each:10,.0f} messages/s {cpu:8.1f} µs CPU a message", flush=True)


def _wait(what: str, times: list[float]) -> None:
    ordered = sorted(times)
    middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    print(f"{what:42} p50 {middle:.2f} ms, p99 {late:.2f} ms", flush=True)


def main(count: int) -> None:
    server = RedisServer(Path(tempfile.mkdtemp(prefix="postroom-redis-")))
    server.start()
    try:
        for what, function in (("raw: XADD, pipelines of 100", raw_send), ("raw: XREADGROUP, XACK, XDEL", raw_take)):
            (found,) = run_together([Child(function, url=server.url, count=count)])
            _told(what, found["cpu"], found["rate"])
        for processes in (1, 2):
            sent = run(producing.enqueue, broker=server.url, task="noop", count=count)
            if processes == 1:
                print("postroom: enqueue_many", sent)
            children = [Child(worker.drain, broker=server.url, queue="quick") for _ in range(processes)]
            results = run_together(children)
            assert sum(result["count"] for result in results) == count
            cpu = sum(result["cpu"] for result in results) / count * 1e6
            _told(f"postroom: worker, {processes} process(es)", cpu, rate(results))
        _wait("raw: XADD to read", run(raw_wait, url=server.url))
        waiting = Child(latency.work, broker=server.url)
        try:
            waiting.read()
            time.sleep(2.0)
            begin, before = time.monotonic(), float(waiting.ask("cpu"))
            time.sleep(5.0)
            share = (float(waiting.ask("cpu")) - before) / (time.monotonic() - begin) * 100
            times = run(latency.produce, broker=server.url, count=200, pause=0.02)
            waiting.tell("stop")
            starts = waiting.result()
        finally:
            waiting.kill()
        _wait(
            "postroom: confirmed to started",
            [max(0.0, starts[str(n)] - end) * 1000 for n, (_, end) in enumerate(times)],
        )
        _wait(
            "postroom: enqueue called to started",
            [(starts[str(n)] - begin) * 1000 for n, (begin, _) in enumerate(times)],
        )
        print(f"{'postroom: idle worker':42} {share:.2f} % of a core")
    finally:
        server.stop()


if __name__ == "__main__":
    # Children are told the module of what they run, by its own name.
    import benchmarks.redis

    benchmarks.redis.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
