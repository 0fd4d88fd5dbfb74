"""What a store adds to a server that keeps no status: its tests of the suite, on RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from services.base import Server

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom import App
from postroom.broker.amqp import AMQPBroker
from postroom.broker.base import Broker
from postroom.store.beside import StoredBroker
from postroom.store.sqlite import SQLiteStore
from postroom.testing.harness import Harness
from postroom.testing.suite import SUITE
from tests.servers import private
from tests.unit.test_unique import check_beside_a_server

ADDED = {"jobs", "deduplication", "known_ids"}
# A replay is the broker's own, which knows no ids.
globals().update(
    {
        name.rpartition(".")[2]: test.run
        for name, test in SUITE.items()
        if ADDED & set(test.needs) and "retention" not in test.needs
    }
)


class StoredHarness(Harness):
    unit = 1.0
    slack = 0.2
    outage = 20.0

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self._url = f"{server.url}?namespace=stored-{uuid4().hex[:8]}"
        self._store = f"sqlite:///{folder}/jobs.db"

    def make_broker(self) -> Broker:
        return StoredBroker(AMQPBroker(self._url), SQLiteStore(self._store))

    async def restart(self) -> None:
        # RabbitMQ 3.10 writes the name of a new queue only after half a second, whatever it has confirmed by then.
        await asyncio.sleep(2.0)
        self._server.restart()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        yield made


@pytest.fixture
def harness(server: Server, tmp_path: Path) -> Harness:
    return StoredHarness(server, tmp_path)


def test_unique_jobs_through_a_store(server: Server, tmp_path: Path) -> None:
    with App(f"{server.url}?namespace=unique-{uuid4().hex[:8]}", store=f"sqlite:///{tmp_path}/jobs.db") as app:
        check_beside_a_server(app)
