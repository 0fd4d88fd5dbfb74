"""The conformance suite on Valkey, which left Redis at 7.2 and goes its own way since."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from services.base import Server

from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.conformance.test_redis import RedisHarness
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("valkey", tmp_path_factory.mktemp("valkey")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return RedisHarness(server)
