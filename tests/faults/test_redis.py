"""Redis under fault: workers and servers that die, freeze, and lose their answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from services.base import Server
from services.redis import RedisServer

from postroom import JobState
from postroom.broker.base import Ack, Retry, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message, new_id
from tests.faults.processes import Stage, records_of, stage, states, wait_until_done
from tests.faults.proxy import proxy_to
from tests.faults.test_kill import producer
from tests.servers import private

JOBS = 10_000
DEATH_NOTICE = RedisBroker.capabilities.death_notice
QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("redis", tmp_path / "redis") as made:
        yield made


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, url=server.url) as made:
        yield made


@pytest.fixture
def tasks(faults: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = producer(faults, monkeypatch)
    yield module
    module.app.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3: two workers, one killed now and then; all is done, and again only what a dead one had begun."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(JOBS))]
    workers = [faults.worker("50") for _ in range(2)]
    killed = set()
    for _ in range(3):
        before = sum(faults.counts("end").values())
        deadline = time.monotonic() + 60
        while sum(faults.counts("end").values()) < before + JOBS / 5:
            assert time.monotonic() < deadline, faults.tail()
            time.sleep(0.2)
        victim = workers.pop(0)
        killed.add(victim.pid)
        faults.kill(victim)
        workers.append(faults.worker("50"))
    wait_until_done(tasks.app, faults, 60)
    assert states(tasks.app, ids) == {JobState.SUCCEEDED: JOBS}
    assert set(faults.counts("end")) == set(ids)
    again = {job_id for job_id, times in faults.counts("start").items() if times > 1}
    begun = {record["id"] for record in faults.records() if record["event"] == "start" and record["pid"] in killed}
    assert again <= begun, "a job ran twice although nobody who held it died"


@pytest.mark.slow
def test_redelivery_after_a_kill(faults: Stage, tasks: ModuleType) -> None:
    """C4: long before the lease of 30 s ends, for nothing is heard of the dead any more."""
    workers = {worker.pid: worker for worker in (faults.worker("5"), faults.worker("5"))}
    tasks.block.enqueue(0.0).result(timeout=20)
    job = tasks.block.enqueue(0.5)
    (start,) = faults.wait_for("start", job.id)
    killed_at = time.monotonic()
    faults.kill(workers[start["pid"]])
    again = faults.wait_for("start", job.id, times=2)[1]
    # It runs apart, in a process that has to start first.
    assert again["t"] - killed_at <= DEATH_NOTICE + 2.0
    assert job.result(timeout=20) == "done"
    assert [failure.reason for failure in records_of(tasks.app, job.id).failures] == ["worker_lost"]


@pytest.mark.slow
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b: two killers and 100 healthy messages; exactly the killers die, after 5 starts each."""
    healthy = [tasks.healthy.call() for _ in range(100)]
    killers = [tasks.killer.call() for _ in range(2)]
    tasks.healthy.enqueue_many(healthy[:30] + killers[:1] + healthy[30:60] + killers[1:] + healthy[60:])
    workers = [faults.worker("50") for _ in range(2)]
    deadline = time.monotonic() + 100
    while any(stats.ready + stats.delayed + stats.running for stats in tasks.app.stats()):
        assert time.monotonic() < deadline, (tasks.app.stats(), faults.tail())
        for worker in list(workers):
            if worker.poll() is not None:
                workers.remove(worker)
                faults.workers.remove(worker)
                workers.append(faults.worker("50"))
        time.sleep(0.1)
    bad = [call.message.id for call in killers]
    assert states(tasks.app, [call.message.id for call in healthy]) == {JobState.SUCCEEDED: 100}
    assert [faults.counts("start")[job_id] for job_id in bad] == [5, 5]
    letters = tasks.app.dead_letters("mixed").list()
    assert sorted(letter.message.id for letter in letters) == sorted(bad)
    assert all([failure.reason for failure in letter.failures] == ["worker_lost"] * 5 for letter in letters)


@pytest.mark.slow
def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: its lease ends, its message runs elsewhere; thawed, it settles nothing."""
    faults.environment["FAULTS_LEASE"] = "4"
    first = faults.worker("5")
    job = tasks.block.enqueue(1.5)
    faults.wait_for("start", job.id)
    os.kill(first.pid, signal.SIGSTOP)
    faults.worker("5")
    faults.wait_for("end", job.id)
    wait_until_done(tasks.app, faults, 20)
    before = records_of(tasks.app, job.id)
    os.kill(first.pid, signal.SIGCONT)
    faults.wait_for_log("lost the lease|not settled")
    assert before == records_of(tasks.app, job.id)
    assert (before.state, before.attempt) == (JobState.SUCCEEDED, 2)


@pytest.mark.slow
def test_a_killed_server_loses_nothing(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17: killed under load and gone for 6 s: all is done, nobody is taken for dead, and nothing is started twice
    but what was being settled."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(1000))]
    for _ in range(3):
        # Each of different luck in coming back: none may take the others for dead.
        faults.worker("10")
    faults.wait_for("end", ids[100])
    server.kill()
    time.sleep(6.0)
    server.start()
    back_at = time.monotonic()
    done_before = sum(faults.counts("end").values())
    while sum(faults.counts("end").values()) <= done_before + 50:
        assert time.monotonic() < back_at + 30, faults.tail()
        time.sleep(0.1)
    wait_until_done(tasks.app, faults, 60)
    assert states(tasks.app, ids) == {JobState.SUCCEEDED: 1000}
    assert set(faults.counts("end")) == set(ids)
    records = [records_of(tasks.app, job_id) for job_id in ids]
    assert not [record for record in records if record.failures], "who lives was taken for dead"


def message(**options: object) -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}", **options)  # type: ignore[arg-type]


def test_a_lost_answer_makes_no_second_message(server: Server) -> None:
    """I3: the server has stored it, the answer is lost, the caller is told so and publishes it again."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = RedisBroker(f"redis://127.0.0.1:{proxy.port}")
            await broker.connect()
            await broker.declare(*QUEUE)
            sent = [message() for _ in range(10)]
            await broker.publish([message()])
            proxy.lose_replies = 1
            with pytest.raises(BrokerUnavailable):
                await broker.publish(sent)
            (stats,) = await broker.stats()
            assert stats.ready == 11, "it was not stored at all: nothing was tested"
            assert await broker.publish(sent) == [item.id for item in sent]
            assert (await broker.stats())[0].ready == 11
            await broker.close()

    asyncio.run(main())


def test_a_lost_answer_to_a_settle(server: Server) -> None:
    """C5: asked again, the server says whose settle it was: settled, not lost; and a retry is counted once."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = RedisBroker(f"redis://127.0.0.1:{proxy.port}")
            await broker.connect()
            await broker.declare(*QUEUE)
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


def test_a_silent_server_is_noticed(server: Server) -> None:
    """C17: half-open, as after a network failure: told within seconds, and used again when it answers."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = RedisBroker(f"redis://127.0.0.1:{proxy.port}")
            await broker.connect()
            await broker.declare(*QUEUE)
            consumer = await broker.consume("q")
            receiving = asyncio.create_task(consumer.receive(1, None))
            await asyncio.sleep(0.2)
            proxy.silent = True
            begin = time.monotonic()
            with pytest.raises(BrokerUnavailable):
                await receiving
            assert time.monotonic() - begin < 10
            proxy.silent = False
            await broker.publish([message()])
            assert len(await consumer.receive(1, 5.0)) == 1
            await broker.close()

    asyncio.run(main())


def test_a_server_that_is_down_costs_nothing(server: Server, tmp_path: Path) -> None:
    """I32: no busy loop while it is away."""

    async def main() -> float:
        broker = RedisBroker(server.url)
        await broker.connect()
        await broker.declare(*QUEUE)
        consumer = await broker.consume("q")
        server.kill()
        begin = time.process_time()
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                await consumer.receive(1, 5.0)
            await asyncio.sleep(1.0)
        used = time.process_time() - begin
        server.start()
        await broker.publish([message()])
        assert len(await consumer.receive(1, 5.0)) == 1
        await broker.close()
        return used

    assert asyncio.run(main()) < 0.5


def test_a_full_server_takes_no_messages_but_lets_work_go_on(tmp_path: Path) -> None:
    """F10: out of memory a publish is refused whole, and what is there is delivered and settled."""
    with private("redis", tmp_path / "redis") as server:
        assert isinstance(server, RedisServer)

        async def main() -> None:
            broker = RedisBroker(server.url)
            await broker.connect()
            await broker.declare(*QUEUE)
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
