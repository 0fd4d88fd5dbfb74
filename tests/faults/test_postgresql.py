"""PostgreSQL under fault: workers and servers that die, freeze, and lose their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from services.base import Server

from postroom.broker.base import Ack, Retry
from postroom.broker.postgresql import PostgreSQLBroker, link
from postroom.errors import BrokerUnavailable
from postroom.message import Failure
from tests.faults.processes import Stage, producer, stage
from tests.faults.proxy import proxy_to
from tests.faults.scenarios import (
    FIVE,
    freeze_a_worker,
    kill_now_and_then,
    kill_the_server_under_load,
    killers_among_innocents,
    lose_the_answer_to_a_publish,
    message,
    ready,
    seconds_to_redelivery,
    silence_the_server,
)
from tests.servers import private

LEASE = 6.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("postgresql", tmp_path / "postgresql") as made:
        yield made


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, url=f"{server.url}?migrate=auto", lease=LEASE) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3."""
    kill_now_and_then(faults, tasks, jobs=10_000, pause=0.01, workers=2, concurrency=20, kills=3, every=500)


@pytest.mark.timed
@pytest.mark.slow
def test_redelivery_after_a_kill(faults: Stage, tasks: ModuleType) -> None:
    """C4: within the lease, and not before."""
    assert LEASE / 2 < seconds_to_redelivery(faults, tasks) <= LEASE + 4.0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killers_among_innocents(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I11b: after five starts each."""
    with stage(tmp_path, url=f"{server.url}?migrate=auto", lease=2.0) as faults:
        tasks = producer(faults, monkeypatch)
        assert killers_among_innocents(faults, tasks, healthy=60, killers=2) == [FIVE] * 2
        tasks.app.close()


@pytest.mark.slow
def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: frozen past its lease."""
    freeze_a_worker(faults, tasks, pause=1.5)


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_server_loses_nothing(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17."""
    kill_the_server_under_load(server, faults, tasks, jobs=1000, workers=2, concurrency=10, away=3.0)


async def connected(url: str) -> PostgreSQLBroker:
    return await ready(PostgreSQLBroker(f"{url}?migrate=auto"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TIMEOUT", 2.0)


def test_a_lost_answer_makes_no_second_message(server: Server, impatient: None) -> None:
    """I3: the server has stored it, the answer is lost, the caller is told so and publishes it again."""

    async def main() -> None:
        direct = await connected(server.url)
        with proxy_to(server.port) as proxy:
            broker = await connected(server.url.replace(str(server.port), str(proxy.port)))
            await lose_the_answer_to_a_publish(broker, proxy, direct)
            await broker.close()
        await direct.close()

    asyncio.run(main())


def test_a_lost_answer_to_a_settle(server: Server, impatient: None) -> None:
    """C5: asked again, after another has taken the message, the server says whose settle it was."""

    async def main() -> None:
        direct = await connected(server.url)
        with proxy_to(server.port) as proxy:
            broker = await connected(server.url.replace(str(server.port), str(proxy.port)))
            consumer = await broker.consume("q")
            failure, warm = Failure(attempt=1, reason="error"), False
            for _ in range(10):
                await direct.publish([message(), message()])
                acked, failed = await consumer.receive(2, 5.0)
                settlements = [(acked, Ack()), (failed, Retry(delay=0.0, failure=failure))]
                # The first time it is prepared: its answers are several.
                proxy.lose_replies = int(warm)
                warm = True
                try:
                    await consumer.settle(settlements)
                except BrokerUnavailable:
                    break
                # A hint was lost instead.
                await direct.purge("q")
            else:
                pytest.fail("no settle lost its answer")
            other = await direct.consume("q")
            (taken,) = await other.receive(2, 5.0)
            assert (taken.message.id, taken.attempt) == (failed.message.id, 2)
            assert await consumer.settle(settlements) == [None, None]
            (record,) = await direct.jobs.get(failed.message.id)
            assert (record.state, record.attempt, record.failures) == ("running", 2, (failure,))
            assert await other.settle([(taken, Ack())]) == [None]
            await broker.close()
        await direct.close()

    asyncio.run(main())


@pytest.mark.timed
def test_a_silent_server_is_noticed(server: Server, impatient: None) -> None:
    """C17: half-open, as after a network failure: told within seconds, and used again when it answers."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = await connected(server.url.replace(str(server.port), str(proxy.port)))
            await silence_the_server(broker, proxy, within=10)
            await broker.close()

    asyncio.run(main())
