"""Priorities by lanes, on the servers that have none of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from services.base import Server
from services.sqs import CREDENTIALS, SQSServer

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom.broker.base import PRIORITIES, Broker, Capabilities
from postroom.broker.lanes import LanedBroker
from postroom.testing.harness import Harness
from postroom.testing.suite import SUITE
from tests.conformance.test_kafka import KafkaHarness
from tests.conformance.test_rabbitmq import RabbitMQHarness
from tests.conformance.test_sqs import SQSHarness
from tests.servers import private

# A higher lane has half a second to answer.
pytestmark = [pytest.mark.server, pytest.mark.timed]

globals().update({name.rpartition(".")[2]: test.run for name, test in SUITE.items() if "priorities" in test.needs})


class LanedHarness(Harness):
    """Another one, whose brokers have lanes."""

    def __init__(self, inner: Harness, levels: frozenset[int]) -> None:
        self.inner, self.levels = inner, levels
        self.unit, self.slack, self.patience = inner.unit, inner.slack, inner.patience

    @property
    def capabilities(self) -> Capabilities:
        return self.make_broker().capabilities

    def make_broker(self) -> Broker:
        return LanedBroker(self.inner.make_broker(), self.levels)

    async def stop(self) -> None:
        await self.inner.stop()


@pytest.fixture(scope="module", params=["kafka", "rabbitmq", "sqs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, private(request.param, tmp_path_factory.mktemp("lanes")) as made:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture
def harness(server: Server, request: pytest.FixtureRequest) -> Harness:
    inner: Harness
    if isinstance(server, SQSServer):
        inner = SQSHarness(server)
    elif server.name == "kafka":
        inner = KafkaHarness(server)
    else:
        inner = RabbitMQHarness(f"{server.url}?namespace=lanes", server)
    # The others would only take longer with all of them.
    return LanedHarness(inner, PRIORITIES if "batch" in request.node.name else frozenset({1, 5, 9}))
