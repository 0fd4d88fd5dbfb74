"""Redis under fault: workers and servers that die, freeze, and lose their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from services.base import Server
from services.redis import RedisServer

from postroom.broker.base import Ack, Delivery, Release, Retry, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerUnavailable
from postroom.message import Failure
from tests.faults.processes import Stage, records_of, stage
from tests.faults.proxy import Proxy, proxy_to
from tests.faults.scenarios import (
    FIVE,
    freeze_a_worker,
    kill_now_and_then,
    kill_the_server_under_load,
    killers_among_innocents,
    lose_the_answer_to_a_publish,
    message,
    ready,
    refused_without_a_busy_loop,
    seconds_to_redelivery,
    silence_the_server,
)
from tests.servers import private


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("redis", tmp_path / "redis") as made:
        yield made


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, url=server.url) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3."""
    kill_now_and_then(faults, tasks, jobs=10_000, pause=0.05, workers=2, concurrency=50, kills=3, every=2000)


@pytest.mark.timed
@pytest.mark.slow
def test_redelivery_after_a_kill(faults: Stage, tasks: ModuleType) -> None:
    """C4: long before the lease of 30 s ends, for nothing is heard of the dead any more."""
    assert seconds_to_redelivery(faults, tasks) <= RedisBroker.capabilities.death_notice + 2.0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b: after five starts each."""
    assert killers_among_innocents(faults, tasks, healthy=100, killers=2) == [FIVE] * 2


@pytest.mark.slow
def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: its lease ends, its message runs elsewhere; thawed, it settles nothing."""
    faults.environment["FAULTS_LEASE"] = "4"
    freeze_a_worker(faults, tasks, pause=1.5)


def test_a_lost_answer_to_a_claim(server: Server) -> None:
    """C4: what nobody has heard of is given back by the next claim, not when its lease ends."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = RedisBroker(f"redis://127.0.0.1:{proxy.port}")
            await broker.connect()
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
            consumer = await broker.consume("q", lease=600.0)
            assert await consumer.receive(1, 0.0) == []
            sent = [message() for _ in range(3)]
            await broker.publish(sent)
            for _ in range(10):
                # A sign of life may lose its answer instead.
                proxy.lose_replies = 1
                try:
                    got = await consumer.receive(2, 0.0)
                except BrokerUnavailable:
                    break
                await consumer.settle([(delivery, Release()) for delivery in got])
            else:
                pytest.fail("no claim lost its answer")
            (stats,) = await broker.stats()
            assert stats.running == 2, "it took nothing: nothing was tested"
            got = await consumer.receive(3, 5.0)
            assert [delivery.message.id for delivery in got] == [item.id for item in sent]
            assert [delivery.attempt for delivery in got] == [1] * 3
            await broker.close()

    asyncio.run(main())


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_server_loses_nothing(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17: nobody is taken for dead, though each of three workers comes back with different luck."""
    ids = kill_the_server_under_load(server, faults, tasks, jobs=1000, workers=3, concurrency=10, away=6.0)
    records = [records_of(tasks.app, job_id) for job_id in ids]
    assert not [record for record in records if record.failures], "who lives was taken for dead"


def behind(proxy: Proxy) -> RedisBroker:
    return RedisBroker(f"redis://127.0.0.1:{proxy.port}")


def test_a_lost_answer_makes_no_second_message(server: Server) -> None:
    """I3."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = await ready(behind(proxy))
            await lose_the_answer_to_a_publish(broker, proxy, broker)
            await broker.close()

    asyncio.run(main())


def test_a_lost_answer_to_a_settle(server: Server) -> None:
    """C5: asked again, the server says whose settle it was: settled, not lost; and a retry is counted once."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = await ready(behind(proxy))
            consumer = await broker.consume("q")
            failure, warm = Failure(attempt=1, reason="error"), False
            for _ in range(10):
                await broker.publish([message(), message()])
                acked, failed = await consumer.receive(2, 5.0)
                settlements = [(acked, Ack()), (failed, Retry(delay=60.0, failure=failure))]
                # The first time it is only said that the server does not know the script.
                proxy.lose_replies = int(warm)
                warm = True
                try:
                    await consumer.settle(settlements)
                except BrokerUnavailable:
                    break
                # A sign of life lost its answer instead.
            else:
                pytest.fail("no settle lost its answer")
            answers = await consumer.settle(settlements)
            assert answers == [None, None]
            (record,) = await broker.jobs.get(failed.message.id)
            assert (record.attempt, record.failures) == (2, (failure,))
            await broker.close()

    asyncio.run(main())


@pytest.mark.timed
def test_a_silent_server_is_noticed(server: Server) -> None:
    """C17."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = await ready(behind(proxy))
            await silence_the_server(broker, proxy, within=10)
            await broker.close()

    asyncio.run(main())


def test_a_server_that_is_down_costs_nothing(server: Server) -> None:
    """I32."""

    async def main() -> None:
        broker = await ready(RedisBroker(server.url))
        consumer = await broker.consume("q")
        server.kill()
        await refused_without_a_busy_loop(consumer)
        server.start()
        await broker.publish([message()])
        assert len(await consumer.receive(1, 5.0)) == 1
        await broker.close()

    asyncio.run(main())


def test_what_starts_just_after_a_restart_is_noted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """C7: before anything is taken from a server that was away, it can be told again what starts."""
    monkeypatch.setattr("postroom.broker.redis.broker._BEAT", 3600.0)

    async def main() -> None:
        broker = await ready(RedisBroker(server.url))
        consumer = await broker.consume("q")
        await broker.publish([message()])
        server.restart()
        taken: list[Delivery] = []
        while not taken:
            with suppress(BrokerUnavailable):
                taken = await consumer.receive(1, 5.0)
        consumer.started(taken)
        key = broker._link.key("sub", "q", "started")
        async with asyncio.timeout(5), broker._link.new_client(1) as client:
            while not await client.scard(key):  # noqa: ASYNC110 -- told by no event
                await asyncio.sleep(0.01)
        await broker.close()

    asyncio.run(main())


def test_a_full_server_takes_no_messages_but_lets_work_go_on(tmp_path: Path) -> None:
    """F10: out of memory a publish is refused whole, and what is there is delivered and settled."""
    with private("redis", tmp_path / "redis") as server:
        assert isinstance(server, RedisServer)

        async def main() -> None:
            broker = await ready(RedisBroker(server.url))
            await broker.publish([message()])
            async with broker._link.new_client(1) as client:
                await client.config_set("maxmemory", 1_000_000)
            with pytest.raises(BrokerUnavailable, match="maxmemory"):
                await broker.publish([message(), message()])
            consumer = await broker.consume("q")
            (delivery,) = await consumer.receive(5, 5.0)
            assert await consumer.settle([(delivery, Ack())]) == [None]
            async with broker._link.new_client(1) as client:
                await client.config_set("maxmemory", 0)
            await broker.publish([message()])
            assert (await broker.stats())[0].ready == 1
            await broker.close()

        asyncio.run(main())
