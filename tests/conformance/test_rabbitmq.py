"""The conformance suite on RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from services.base import Server

from postroom.broker.amqp import AMQPBroker
from postroom.broker.base import Subscription, Topic
from postroom.message import Message, new_id
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.servers import named, private


class RabbitMQHarness(Harness):
    unit = 0.6
    slack = 0.1
    outage = 20.0

    def __init__(self, url: str, server: Server | None) -> None:
        self._url = url
        self._server = server

    def make_broker(self) -> AMQPBroker:
        return AMQPBroker(self._url)

    async def restart(self) -> None:
        # One that is named from outside belongs to others, too.
        if self._server is not None:
            # RabbitMQ 3.10 writes the name of a new queue only after half a second, whatever it has confirmed by then.
            await asyncio.sleep(2.0)
            self._server.restart()

    async def stop(self) -> None:
        broker = self.make_broker()
        await broker.connect()
        for subscription in await broker.stats():
            await broker.unsubscribe(subscription.name)
        await broker.close()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | None]:
    if named("rabbitmq") is not None:
        yield None
        return
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def harness(rabbitmq: Server | None) -> Harness:
    url = named("rabbitmq") or (rabbitmq.url if rabbitmq else "")
    return RabbitMQHarness(f"{url}?namespace={_NAMESPACE}", rabbitmq)


def test_an_older_server_refuses_the_urgent(harness: Harness) -> None:
    async def main() -> None:
        broker = harness.make_broker()
        await broker.connect()
        if not broker.capabilities.priorities:
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            [told] = await broker.publish([Message(id=new_id(), topic="q", name="n", body=b"", priority=1)])
            assert "priority=1: RabbitMQ has priorities for quorum queues since 4.3, and this is 3." in str(told)
        await broker.close()

    asyncio.run(main())


_NAMESPACE = f"conformance-{uuid4().hex[:8]}"
