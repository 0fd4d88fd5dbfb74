"""The Redis broker when something comes in between: an unsubscribe, a close, a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from uuid import uuid4

import pytest
from services.base import Server

from postroom.broker.base import Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerClosed, SubscriptionNotFound
from postroom.message import Message
from tests.servers import private

QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.url}?namespace=t{uuid4().hex[:12]}"


def test_a_subscription_that_goes_while_it_is_given_its_history(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="t", retention=3600)], [Subscription(name="s", pattern="t")])
        await broker.publish([Message(id="1", topic="t", name="n", body=b"")])
        run = broker._link.run

        async def overtaken(name: str, *arguments: object, version: str = "") -> object:
            if name == "replay":
                await broker.unsubscribe("s")
            return await run(name, *arguments, version=version)

        monkeypatch.setattr(broker._link, "run", overtaken)
        with pytest.raises(SubscriptionNotFound):
            await broker.replay("s")
        await broker.close()

    asyncio.run(main())


def test_what_is_claimed_while_the_consumer_closes_is_given_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        await broker.publish([Message(id="1", topic="q", name="n", body=b"")])
        consumer = await broker.consume("q")
        run, claimed, answer = broker._link.run, asyncio.Event(), asyncio.Event()

        async def slow(name: str, *arguments: object, version: str = "") -> object:
            told = await run(name, *arguments, version=version)
            if name == "claim":
                claimed.set()
                await answer.wait()
            return told

        monkeypatch.setattr(broker._link, "run", slow)
        receiving = asyncio.ensure_future(consumer.receive(1, 1.0))
        await claimed.wait()
        closing = asyncio.ensure_future(consumer.close())
        await asyncio.sleep(0)
        answer.set()
        await closing
        with pytest.raises(BrokerClosed):
            await receiving
        (stats,) = await broker.stats()
        assert (stats.ready, stats.running) == (1, 0)
        await broker.close()

    asyncio.run(main())


HOLDER = """
import asyncio, os, sys, time
from postroom.broker.redis import RedisBroker

async def main():
    broker = RedisBroker(sys.argv[1])
    await broker.connect()
    consumer = await broker.consume("q")
    await consumer.receive(1, 10.0)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.timed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_was_forked_does_not_stand_for_its_parent(url: str) -> None:
    """C4: as of a pool of processes that a handler has made, which outlives the worker that is killed."""

    async def main(holder: subprocess.Popen[bytes]) -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        await broker.publish([Message(id="1", topic="q", name="n", body=b"")])
        assert holder.stdout is not None
        child = int(await asyncio.to_thread(holder.stdout.readline))
        try:
            holder.kill()
            consumer = await broker.consume("q")
            assert len(await consumer.receive(1, RedisBroker.capabilities.death_notice + 4.0)) == 1
        finally:
            os.kill(child, signal.SIGKILL)
        await broker.close()

    async def declared() -> None:
        broker = RedisBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        await broker.close()

    asyncio.run(declared())
    with subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE) as holder:
        try:
            asyncio.run(main(holder))
        finally:
            holder.kill()
