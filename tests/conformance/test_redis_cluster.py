"""The conformance suite on a Redis Cluster of several nodes: no script may touch keys of two slots."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis.asyncio import RedisCluster as Client
from services.redis_cluster import RedisCluster

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom.broker.base import Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.message import Message, new_id
from postroom.store.base import Admission, Claim, Done
from postroom.store.redis import RedisStore
from postroom.testing.clock import ManualClock
from postroom.testing.harness import Harness
from postroom.testing.suite import SUITE
from tests.servers import started

# Every script is in one of these; the rest of the suite would only run them again.
PARTS = {
    "dead_letters", "deduplication", "fan_out", "fencing", "jobs", "ordering", "retention", "settle", "unique",
}  # fmt: skip
globals().update({name.rpartition(".")[2]: test.run for name, test in SUITE.items() if name.split(".")[0] in PARTS})


class AnsweredClock(ManualClock):
    """What a note of ``started`` says travels without an answer; whoever makes time jump must not overtake it."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url.partition("?")[0]

    async def advance(self, seconds: float) -> None:
        async with Client.from_url(self._url) as client:
            await client.ping(target_nodes=Client.ALL_NODES)
        await super().advance(seconds)


class ClusterHarness(Harness):
    outage = 20.0

    def __init__(self, server: RedisCluster) -> None:
        self.clock = AnsweredClock(server.url)
        self._server = server
        # By its hash the namespace falls to one of the nodes, another in each test.
        self._url = f"{server.url}&namespace=t{uuid4().hex[:12]}"

    def make_broker(self) -> RedisBroker:
        return RedisBroker(self._url, clock=self.clock)

    async def restart(self) -> None:
        self._server.restart()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with started(RedisCluster(tmp_path_factory.mktemp("redis"))) as made:
        assert isinstance(made, RedisCluster)
        yield made


@pytest.fixture
def harness(server: RedisCluster) -> Harness:
    return ClusterHarness(server)


def test_a_store_in_a_cluster(server: RedisCluster) -> None:
    """Its scripts and single commands, too, stay in one slot."""
    clock = ManualClock()
    job = Message(id=new_id(), topic="q", name="work", body=b"{}", idempotency_key="k", result_ttl=60.0)

    async def run() -> None:
        store = RedisStore(f"{server.url}&namespace=t{uuid4().hex[:12]}", clock=clock)
        await store.connect()
        await store.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        assert await store.admit([job]) == [Admission(job.id, publish=True)]
        await store.confirm([job.id])
        claim = Claim(job, "q", 1, False, "t", "c", False)
        assert await store.deliver([claim]) == [None]
        assert await store.jobs.cancel(job.id) == "requested"
        assert await store.finish([(claim, Done(b"1"))]) == [True]
        assert [record.result for record in await store.jobs.search(subscription="q")] == [b"1"]
        await clock.advance(3700.0)
        await store.sweep()
        assert await store.jobs.get(job.id) == []
        await store.unsubscribed("q")
        await store.close()

    asyncio.run(run())
