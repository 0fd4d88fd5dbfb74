"""What other clients produce: nothing that one of them writes stops what the others do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
from redis import Redis
from services.base import Server

from postroom.broker.base import Subscription, Topic
from postroom.broker.redis import RedisBroker, inlet
from postroom.message import Message
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 -- the server is waited for
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("priority", ["9" * 5000, "10", "-1", "\u00b2", "high", ""])
def test_a_priority_that_is_none_is_a_header(server: Server, namespace: str, priority: str) -> None:
    async def main() -> None:
        broker = RedisBroker(f"{server.url}?namespace={namespace}")
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        with Redis.from_url(server.url) as client:
            client.xadd(f"{{{namespace}}}:inlet:q", {"type": "n", "data": "1", "priority": priority})
        (delivery,) = await (await broker.consume("q")).receive(1, 5.0)
        assert (delivery.message.priority, delivery.message.headers) == (0, {"priority": priority})
        await broker.close()

    asyncio.run(main())


def test_what_a_full_queue_refuses_comes_when_there_is_room(
    server: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it at once, not a page at a time."""
    monkeypatch.setattr(inlet, "_ABANDONED", 0.5)
    stream = f"{{{namespace}}}:inlet:q"

    async def main(client: Redis) -> None:
        broker = RedisBroker(f"{server.url}?namespace={namespace}")
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q", limit=1000)])
        await broker.publish([Message(id=f"{n}", topic="q", name="n", body=b"") for n in range(1000)])
        client.xgroup_create(stream, inlet.GROUP, id="0", mkstream=True)
        with client.pipeline() as pipeline:
            for _ in range(1000):
                pipeline.xadd(stream, {"type": "n", "data": "1"})
            pipeline.execute()
        await broker.consume("q")
        await until(lambda: client.xpending(stream, inlet.GROUP)["pending"] == 1000)
        assert await broker.purge("q") == 1000
        await until(lambda: client.xlen(stream) == 0)
        assert (await broker.stats())[0].ready == 1000
        await broker.close()

    with Redis.from_url(server.url) as client:
        asyncio.run(main(client))
