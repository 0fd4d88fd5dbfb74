"""The store in Redis: nobody overwrites what another has changed, and nothing stays of what is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from services.sqs import CREDENTIALS, SQSServer

from postroom import App
from postroom.broker.base import Subscription, Topic
from postroom.message import Message, new_id
from postroom.store.base import Admission, Claim, Done
from postroom.store.redis import RedisStore
from postroom.store.redis.rows import Place, Row
from postroom.testing.clock import ManualClock
from tests.conftest import working
from tests.servers import started, url_of
from tests.unit.test_unique import check_beside_a_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("redis", tmp_path_factory) as url:
        yield url


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


def message(**fields: object) -> Message:
    return Message(**({"id": new_id(), "topic": "q", "name": "work", "body": b"{}", "created_at": 1.0} | fields))  # type: ignore[arg-type]


async def opened(url: str, namespace: str, clock: ManualClock) -> RedisStore:
    store = RedisStore(f"{url}?namespace={namespace}", clock=clock)
    await store.connect()
    await store.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
    return store


def test_what_many_change_at_once_is_changed_by_all(server: str, namespace: str) -> None:
    """I2: each change is of what it has read, or it is made again."""
    clock, job = ManualClock(), message()

    def one_more(_: Place, row: Row | None) -> Row | None:
        assert row is not None
        row.record.attempt += 1
        return row

    async def run() -> None:
        stores = [await opened(server, namespace, clock) for _ in range(2)]
        await stores[0].admit([job])
        await asyncio.gather(*(stores[n % 2].rows.change([Place(job.id, "q")], one_more) for n in range(20)))
        (record,) = await stores[1].jobs.get(job.id)
        assert record.attempt == 21
        for store in stores:
            await store.close()

    asyncio.run(run())


def test_nothing_stays_of_what_is_over(server: str, namespace: str) -> None:
    """C15: records, their order and their keys; of those that are not over, all."""
    clock = ManualClock()
    jobs = [message(idempotency_key=f"k{number}", result_ttl=60.0, dedup_window=60.0) for number in range(3)]
    jobs.append(message(idempotency_key="u", unique="until_done", result_ttl=60.0))
    refused, waiting = message(idempotency_key="r"), message(created_at=clock.now())

    async def run() -> None:
        store = await opened(server, namespace, clock)
        await store.admit([*jobs, refused, waiting])
        await store.confirm([waiting.id, *(job.id for job in jobs)])
        await store.withdraw([refused.id])
        claims = [Claim(job, "q", 1, False, f"t{job.id}", "", False) for job in jobs]
        assert await store.deliver(claims) == [None] * 4
        assert await store.finish([(claim, Done()) for claim in claims]) == [True] * 4
        await clock.advance(3700.0)
        await store.sweep()
        assert [record.id for record in await store.jobs.search()] == [waiting.id]
        # A day later it is still there: it was confirmed, and nobody has had it.
        await clock.advance(90_000.0)
        await store.sweep()
        (record,) = await store.jobs.search()
        assert record.id == waiting.id
        async with Redis.from_url(server, decode_responses=True) as client:
            keys = {key.partition(":store:")[2] async for key in client.scan_iter(f"{{{namespace}}}:*")}
            ttl = await client.pttl(f"{{{namespace}}}:store:key:q:k0")
        # The server itself forgets idempotency keys, by its own clock.
        assert 3_600_000 < ttl <= 3_660_000
        gone = {f"key:q:k{number}" for number in range(3)}
        assert keys == gone | {"topology", "numbers", "order", "order:q", f"record:{waiting.id}"}
        await store.close()

    asyncio.run(run())


def test_a_key_whose_publisher_died_leads_to_the_same_id(server: str, namespace: str) -> None:
    """C11: it promised nothing; whoever comes next publishes it, and after a confirmation nobody does."""
    clock = ManualClock()
    first, second, third = (message(idempotency_key="k") for _ in range(3))

    async def run() -> None:
        store = await opened(server, namespace, clock)
        assert await store.admit([first]) == [Admission(first.id, publish=True)]
        assert await store.admit([second]) == [Admission(first.id, publish=True)]
        # It had arrived after all.
        await store.deliver([Claim(first, "q", 1, False, "t", "c", False)])
        assert await store.admit([third]) == [Admission(first.id, publish=False)]
        await store.close()

    asyncio.run(run())


def test_beside_another_broker(server: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status, results and idempotency keys for jobs in SQS, by workers of any machine."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with (
        started(SQSServer(tmp_path / "sqs")) as sqs,
        App(f"{sqs.url}&namespace={namespace}", store=f"{server}?namespace={namespace}") as app,
    ):

        @app.task(queue="sums")
        def add(a: int, b: int) -> int:
            return a + b

        jobs = [add.using(idempotency_key="once").enqueue(1, 2) for _ in range(2)]
        with working(app, concurrency=2):
            assert [job.result(timeout=20) for job in jobs] == [3, 3]
        assert jobs[0].id == jobs[1].id
        assert len(app.thread.call(lambda broker: broker.jobs.search())) == 1
        check_beside_a_server(app)


def test_the_doctor_looks_at_the_store(server: str, namespace: str) -> None:
    """A server that drops records by itself breaks what they promise."""
    clock = ManualClock()

    async def run() -> None:
        async with Redis.from_url(server) as client:
            await client.config_set("maxmemory-policy", "allkeys-lru")
            await client.config_set("maxmemory", "500mb")
            store = await opened(server, namespace, clock)
            try:
                found = {finding.title: finding.level for finding in await store.examine()}
            finally:
                await client.config_set("maxmemory-policy", "noeviction")
                await client.config_set("maxmemory", "0")
                await store.close()
        assert found["eviction"] == "error"

    asyncio.run(run())
