"""The conformance suite on the PostgreSQL broker, by a clock that it moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from services.base import Server

from postroom.broker.postgresql import PostgreSQLBroker
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from postroom.testing.state_machine import run_state_machine
from tests.servers import private


class PostgreSQLHarness(Harness):
    """All on a clock that the suite moves."""

    schema = "manual"

    def __init__(self, server: Server) -> None:
        self.clock = ManualClock()
        self._server = server

    def make_broker(self) -> PostgreSQLBroker:
        return PostgreSQLBroker(f"{self._server.url}?schema={self.schema}&migrate=auto", clock=self.clock)

    async def restart(self) -> None:
        self._server.restart()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("postgresql", tmp_path_factory.mktemp("postgresql")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return PostgreSQLHarness(server)


def test_any_sequence_of_operations(server: Server) -> None:
    run_state_machine(lambda: PostgreSQLHarness(server), max_examples=8, shrink=False)
