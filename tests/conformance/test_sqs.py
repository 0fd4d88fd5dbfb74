"""The conformance suite on the SQS broker, against an emulator."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from services.sqs import CREDENTIALS, SQSServer

from postroom.broker.sqs import SQSBroker
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.servers import private


class SQSHarness(Harness):
    # The service counts in whole seconds, and we round up: three of these, a lease, are hardly less than 3 s.
    unit = 0.9
    slack = 0.3
    patience = 12.0
    outage = 8.0

    def __init__(self, server: SQSServer) -> None:
        self._server = server
        # A queue that was deleted, or left behind, concerns no other test.
        self._url = f"{server.url}&namespace=t{uuid4().hex[:12]}"

    def make_broker(self) -> SQSBroker:
        return SQSBroker(self._url)

    async def restart(self) -> None:
        self._server.restart()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQSServer]:
    with pytest.MonkeyPatch.context() as patch, private("sqs", tmp_path_factory.mktemp("sqs")) as made:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        assert isinstance(made, SQSServer)
        yield made


@pytest.fixture
def harness(server: SQSServer) -> Harness:
    return SQSHarness(server)
