"""The conformance suite on the Kafka broker, against a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from confluent_kafka.admin import AdminClient
from services.base import Server

from postroom.broker.kafka import KafkaBroker
from postroom.broker.kafka.consumer import KafkaConsumer
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.servers import private

pytestmark = pytest.mark.server


class AtRest(KafkaBroker):
    """Consumers that are there only once the group has come to rest: no test waits for a rebalance."""

    async def consume(self, subscription: str, *, lease: float = 30.0) -> KafkaConsumer:
        consumer = await super().consume(subscription, lease=lease)
        await consumer.hub.joined()
        return consumer


class KafkaHarness(Harness):
    unit = 0.7
    slack = 0.15
    patience = 12.0
    outage = 18.0

    def __init__(self, server: Server) -> None:
        self._server = server
        self._namespace = f"t{uuid4().hex[:12]}"

    def make_broker(self) -> KafkaBroker:
        return AtRest(f"{self._server.url}?namespace={self._namespace}&partitions=4")

    async def restart(self) -> None:
        await asyncio.to_thread(self._server.restart)

    async def stop(self) -> None:
        await asyncio.to_thread(self._delete_topics)

    def _delete_topics(self) -> None:
        admin = AdminClient(self.make_broker().options.client)
        mine = [name for name in admin.list_topics(timeout=10).topics if name.startswith(self._namespace)]
        if mine:
            for future in admin.delete_topics(mine).values():
                future.result()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return KafkaHarness(server)
