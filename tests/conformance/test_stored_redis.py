"""The conformance suite with a store in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from postroom.broker.base import Broker
from postroom.store.beside import StoredBroker
from postroom.store.redis import RedisStore
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from tests.conformance.test_stored import Poor
from tests.servers import url_of


class RedisStoreHarness(Harness):
    def __init__(self, url: str) -> None:
        self.clock = ManualClock()
        self._namespace = f"t{uuid4().hex[:12]}"
        self._url = f"memory://{self._namespace}"
        self._server = url
        self._store = f"{url}?namespace={self._namespace}"

    def make_broker(self) -> Broker:
        store = RedisStore(self._store, clock=self.clock)
        return StoredBroker(Poor(self._url, clock=self.clock), store, clock=self.clock)

    async def stop(self) -> None:
        async with Redis.from_url(self._server) as client:
            keys = [key async for key in client.scan_iter(f"{{{self._namespace}}}:*")]
            assert not [key for key in keys if not key.startswith(f"{{{self._namespace}}}:store:".encode())]
            if keys:
                await client.delete(*keys)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("redis", tmp_path_factory) as url:
        yield url


@pytest.fixture
def harness(server: str) -> Harness:
    return RedisStoreHarness(server)
