"""The conformance suite on a Redis Cluster of several nodes: no script may touch keys of two slots."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis import Redis as Node
from redis.asyncio import RedisCluster as Client
from redis.crc import key_slot
from services.redis_cluster import RedisCluster

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom.broker.base import Retry, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message, new_id
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


class Move:
    """Of the keys of a namespace from node to node, one by one, as an operator moves slots."""

    def __init__(self, server: RedisCluster, namespace: str) -> None:
        self._slot = key_slot(f"{{{namespace}}}".encode())
        self._nodes = [Node(port=node.port, decode_responses=True) for node in server.nodes]
        self._ids = [node.execute_command("CLUSTER MYID") for node in self._nodes]
        holds = [node.execute_command("CLUSTER COUNTKEYSINSLOT", self._slot) > 0 for node in self._nodes]
        self._from = holds.index(True)
        self._to = (self._from + 1) % len(holds)
        self._port = server.nodes[self._to].port

    def begin(self) -> None:
        self._nodes[self._to].execute_command("CLUSTER SETSLOT", self._slot, "IMPORTING", self._ids[self._from])
        self._nodes[self._from].execute_command("CLUSTER SETSLOT", self._slot, "MIGRATING", self._ids[self._to])

    def carry(self, *, with_: str = "") -> None:
        """The keys that contain this."""
        keys = self._nodes[self._from].execute_command("CLUSTER GETKEYSINSLOT", self._slot, 1000)
        chosen = [key for key in keys if with_ in key]
        self._nodes[self._from].execute_command("MIGRATE", "127.0.0.1", self._port, "", 0, 5000, "KEYS", *chosen)

    def end(self) -> None:
        for node in self._nodes:
            node.execute_command("CLUSTER SETSLOT", self._slot, "NODE", self._ids[self._to])
            node.close()


def test_slots_that_move_lose_nothing(server: RedisCluster) -> None:
    """C2: while only some of its keys have moved a script is refused as a whole; it does nothing by halves."""
    namespace = f"t{uuid4().hex[:12]}"

    async def run() -> None:
        broker = RedisBroker(f"{server.url}&namespace={namespace}")
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        messages = [Message(id=new_id(), topic="q", name="work", body=b"{}") for _ in range(10)]
        await broker.publish(messages)
        consumer = await broker.consume("q")
        deliveries = await consumer.receive(10, 1.0)
        consumer.started(deliveries)
        move = Move(server, namespace)
        move.begin()
        move.carry(with_=":message:")
        failure = Failure(attempt=1, reason="error")
        outcomes = [(delivery, Retry(delay=0.0, failure=failure)) for delivery in deliveries]
        with pytest.raises(BrokerUnavailable):
            await consumer.settle(outcomes)
        with pytest.raises(BrokerUnavailable):
            await broker.publish([Message(id=new_id(), topic="q", name="work", body=b"{}")])
        move.carry()
        move.end()
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await consumer.settle(outcomes) == [None] * 10
                    break
                except BrokerUnavailable:
                    await asyncio.sleep(0.1)
        again = await consumer.receive(20, 5.0)
        assert {delivery.message.id for delivery in again} == {message.id for message in messages}
        await broker.close()

    asyncio.run(run())


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
