"""The conformance suite on a RabbitMQ of today: 4.3 and newer, while another module has the 3.10 of Debian 12."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import msgspec
import pytest
from services.base import Server

from postroom.broker.amqp import AMQPBroker
from postroom.broker.base import Capabilities
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.conformance.test_rabbitmq import RabbitMQHarness
from tests.servers import private


class RabbitMQ4Harness(RabbitMQHarness):
    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(AMQPBroker.capabilities, priorities=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq4", tmp_path_factory.mktemp("rabbitmq4")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return RabbitMQ4Harness(f"{server.url}?namespace={_NAMESPACE}", server)


_NAMESPACE = f"conformance-{uuid4().hex[:8]}"
