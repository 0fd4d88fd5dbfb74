"""The conformance suite on a RabbitMQ of today: 4.3 and newer, while another module has the 3.10 of Debian 12.

As a rule only what depends on the server is tried; with ``POSTROOM_WHOLE_SUITE=1`` in the environment, all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import msgspec
import pytest
from services.base import Server

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom.broker.amqp import AMQPBroker
from postroom.broker.base import Capabilities
from postroom.testing.harness import Harness
from postroom.testing.suite import SUITE
from tests.conformance.test_rabbitmq import RabbitMQHarness
from tests.servers import private

_AREAS = ("dead_letters", "fencing", "ordering", "retention", "timing")
_WHOLE = bool(os.environ.get("POSTROOM_WHOLE_SUITE"))
globals().update(
    {
        name.rpartition(".")[2]: test.run
        for name, test in SUITE.items()
        if _WHOLE or name.partition(".")[0] in _AREAS or "priorities" in test.needs
    }
)


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
