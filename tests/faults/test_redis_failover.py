"""Another server becomes the master, the old one lives on as its replica, and the name leads to the new one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from services.base import Server, wait_until
from services.redis import RedisServer

from postroom.broker.base import Ack, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerUnavailable
from postroom.message import Message, new_id
from tests.faults.proxy import proxy_to
from tests.servers import private, started


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Server]:
    with private("redis", tmp_path / "master") as made:
        yield made


@pytest.fixture
def replica(master: Server, tmp_path: Path) -> Iterator[Server]:
    options = ("--replicaof", "127.0.0.1", str(master.port))
    assert isinstance(master, RedisServer)
    # Of the same kind: Redis and Valkey do not follow each other.
    with started(type(master)(tmp_path / "replica", options=options)) as made, Redis.from_url(made.url) as client:
        wait_until(lambda: client.info()["master_link_status"] == "up", 30.0, "the replica to follow")
        yield made


def message() -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}")


def test_everything_follows_the_new_master(master: Server, replica: Server) -> None:
    """C17: commands, the hint that a message came, and the sign of life, though no connection was cut."""

    async def main() -> None:
        with proxy_to(master.port) as proxy, Redis.from_url(master.url) as old, Redis.from_url(replica.url) as new:
            broker = RedisBroker(f"redis://127.0.0.1:{proxy.port}")
            await broker.connect()
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            consumer = await broker.consume("q")
            await broker.publish([message()])
            (held,) = await consumer.receive(1, 5.0)
            assert await consumer.receive(1, 0.1) == []
            old.execute_command("FAILOVER")
            wait_until(lambda: old.info()["role"] == "slave", 30.0, "the failover")
            proxy.target = replica.port
            deadline = time.monotonic() + 30
            while True:
                try:
                    await consumer.receive(1, 0.0)
                    break
                except BrokerUnavailable:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.2)
            assert await consumer.settle([(held, Ack())]) == [None]
            while not new.pubsub_channels("{postroom}:alive:*"):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            # Whoever only looks by itself finds it after a second: one in three may come just then.
            took = []
            for _ in range(3):
                waiting = asyncio.create_task(consumer.receive(1, 5.0))
                await asyncio.sleep(0.2)
                begin = time.monotonic()
                await broker.publish([message()])
                await consumer.settle([(delivery, Ack()) for delivery in await waiting])
                took.append(time.monotonic() - begin)
            assert sorted(took)[1] < 0.4, took
            await broker.close()

    asyncio.run(main())
