"""The conformance suite with a store in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import asyncpg
import pytest

from postroom.broker.base import Broker
from postroom.store.beside import StoredBroker
from postroom.store.postgresql import PostgreSQLStore
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.conformance.test_stored import Poor
from tests.servers import url_of


class PostgreSQLStoreHarness(Harness):
    def __init__(self, url: str) -> None:
        self.clock = ManualClock()
        self._url = f"memory://{uuid4().hex}"
        self._server = url
        self._store = f"{url}?migrate=auto"

    def make_broker(self) -> Broker:
        store = PostgreSQLStore(self._store, clock=self.clock)
        return StoredBroker(Poor(self._url, clock=self.clock), store, clock=self.clock)

    async def stop(self) -> None:
        connection = await asyncpg.connect(self._server)
        await connection.execute("DROP SCHEMA IF EXISTS postroom_store CASCADE")
        await connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("postgresql", tmp_path_factory) as url:
        yield url


@pytest.fixture
def harness(server: str) -> Harness:
    return PostgreSQLStoreHarness(server)
