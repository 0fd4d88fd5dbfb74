"""What depends on time, on the PostgreSQL broker by the clock of the server, as in production: it really waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from services.base import Server

from postroom.testing.conformance.fencing import *  # noqa: F403
from postroom.testing.conformance.timing import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.conformance.test_postgresql import PostgreSQLHarness
from tests.servers import private


class ServerTimeHarness(PostgreSQLHarness):
    unit = 0.5
    slack = 0.15
    outage = 5.0

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.clock = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("postgresql", tmp_path_factory.mktemp("postgresql")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return ServerTimeHarness(server)
