"""The conformance suite on the Redis broker: by a clock of its own, and the server's where only that can show it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from services.base import Server

from postroom.broker.redis import RedisBroker
from postroom.testing.clock import ManualClock
from postroom.testing.conformance import *  # noqa: F403
from postroom.testing.harness import Harness
from postroom.testing.state_machine import run_state_machine
from tests.servers import private


class AnsweredClock(ManualClock):
    """What a note of ``started`` says travels on a connection of its own, without an answer. Whoever makes time jump
    must not overtake it: when the server has answered something later, it has read the note."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    async def advance(self, seconds: float) -> None:
        async with Redis.from_url(self._url) as client:
            await client.ping()
        await super().advance(seconds)


class RedisHarness(Harness):
    """All on a clock that the suite moves."""

    def __init__(self, server: Server) -> None:
        self.clock = AnsweredClock(server.url)
        self._server = server
        self._url = f"{server.url}?namespace=t{uuid4().hex[:12]}"

    def make_broker(self) -> RedisBroker:
        return RedisBroker(self._url, clock=self.clock)

    async def restart(self) -> None:
        self._server.restart()


class ServerTimeHarness(RedisHarness):
    """All on the clock of the server, as in production: the suite really waits."""

    unit = 0.5
    slack = 0.15
    outage = 5.0

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.clock = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture(params=[RedisHarness, pytest.param(ServerTimeHarness, marks=pytest.mark.slow)])
def harness(server: Server, request: pytest.FixtureRequest) -> Harness:
    made: Harness = request.param(server)
    return made


@pytest.mark.slow
def test_any_sequence_of_operations(server: Server) -> None:
    run_state_machine(lambda: RedisHarness(server), max_examples=40, shrink=False)
