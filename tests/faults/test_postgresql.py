"""PostgreSQL under fault: workers and servers that die, freeze, and lose their answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from services.base import Server

from postroom import JobState
from postroom.broker.base import Ack, Retry, Subscription, Topic
from postroom.broker.postgresql import PostgreSQLBroker, link
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message, new_id
from tests.faults.processes import Stage, records_of, stage, states, wait_until_done
from tests.faults.proxy import proxy_to
from tests.faults.test_kill import producer
from tests.servers import private

LEASE = 6.0
QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private("postgresql", tmp_path / "postgresql") as made:
        yield made


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, url=f"{server.url}?migrate=auto", lease=LEASE) as made:
        yield made


@pytest.fixture
def tasks(faults: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = producer(faults, monkeypatch)
    yield module
    module.app.close()


@pytest.mark.slow
def test_killing_workers_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3: two workers, one killed now and then; all is done, and again only what a dead one had begun."""
    count = 10_000
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.01) for _ in range(count))]
    workers = [faults.worker("20") for _ in range(2)]
    killed = set()
    for _ in range(3):
        before = sum(faults.counts("end").values())
        deadline = time.monotonic() + 60
        while sum(faults.counts("end").values()) < before + 500:
            assert time.monotonic() < deadline, faults.tail()
            time.sleep(0.1)
        victim = workers.pop(0)
        killed.add(victim.pid)
        faults.kill(victim)
        workers.append(faults.worker("20"))
    wait_until_done(tasks.app, faults, 90)
    found = tasks.app.thread.call(lambda broker: broker.jobs.search(limit=2 * count))
    assert Counter(record.state for record in found) == {JobState.SUCCEEDED: count}
    assert set(faults.counts("end")) == set(ids)
    again = {job_id for job_id, times in faults.counts("start").items() if times > 1}
    begun = {record["id"] for record in faults.records() if record["event"] == "start" and record["pid"] in killed}
    assert again <= begun, "a job ran twice although nobody who held it died"


@pytest.mark.slow
def test_redelivery_after_a_kill(faults: Stage, tasks: ModuleType) -> None:
    """C4: within the lease, and not before."""
    workers = {worker.pid: worker for worker in (faults.worker("5"), faults.worker("5"))}
    tasks.block.enqueue(0.0).result(timeout=20)
    job = tasks.block.enqueue(0.5)
    (start,) = faults.wait_for("start", job.id)
    killed_at = time.monotonic()
    faults.kill(workers[start["pid"]])
    again = faults.wait_for("start", job.id, times=2)[1]
    # It runs apart, in a process that has to start first.
    assert LEASE / 2 < again["t"] - killed_at <= LEASE + 4.0
    assert job.result(timeout=20) == "done"
    assert [failure.reason for failure in records_of(tasks.app, job.id).failures] == ["worker_lost"]


@pytest.mark.slow
def test_killers_among_innocents(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I11b: two killers and 60 healthy messages; exactly the killers die, after 5 starts each."""
    with stage(tmp_path, url=f"{server.url}?migrate=auto", lease=2.0) as faults:
        tasks = producer(faults, monkeypatch)
        healthy = [tasks.healthy.call() for _ in range(60)]
        killers = [tasks.killer.call() for _ in range(2)]
        tasks.healthy.enqueue_many(healthy[:20] + killers[:1] + healthy[20:40] + killers[1:] + healthy[40:])
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
        assert states(tasks.app, [call.message.id for call in healthy]) == {JobState.SUCCEEDED: 60}
        assert [faults.counts("start")[job_id] for job_id in bad] == [5, 5]
        letters = tasks.app.dead_letters("mixed").list()
        assert sorted(letter.message.id for letter in letters) == sorted(bad)
        assert all([failure.reason for failure in letter.failures] == ["worker_lost"] * 5 for letter in letters)
        tasks.app.close()


@pytest.mark.slow
def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: its lease over, its message runs elsewhere; thawed, it settles nothing."""
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
    """C1, C17: killed under load and gone for 3 s: what was confirmed is done, and work goes on within 30 s."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(1000))]
    for _ in range(2):
        faults.worker("10")
    faults.wait_for("end", ids[100])
    server.kill()
    time.sleep(3.0)
    server.start()
    back_at = time.monotonic()
    done_before = sum(faults.counts("end").values())
    while sum(faults.counts("end").values()) <= done_before + 50:
        assert time.monotonic() < back_at + 30, faults.tail()
        time.sleep(0.1)
    wait_until_done(tasks.app, faults, 60)
    assert states(tasks.app, ids) == {JobState.SUCCEEDED: 1000}
    assert set(faults.counts("end")) == set(ids)


def message() -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}")


async def connected(url: str) -> PostgreSQLBroker:
    broker = PostgreSQLBroker(f"{url}?migrate=auto")
    await broker.connect()
    await broker.declare(*QUEUE)
    return broker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TIMEOUT", 2.0)


def test_a_lost_answer_makes_no_second_message(server: Server, impatient: None) -> None:
    """I3: the server has stored it, the answer is lost, the caller is told so and publishes it again."""

    async def main() -> None:
        direct = await connected(server.url)
        with proxy_to(server.port) as proxy:
            broker = await connected(server.url.replace(str(server.port), str(proxy.port)))
            sent = [message() for _ in range(10)]
            # The first of all is prepared: its answers are several.
            await broker.publish([message()])
            proxy.lose_replies = 1
            with pytest.raises(BrokerUnavailable):
                await broker.publish(sent)
            (stats,) = await direct.stats()
            assert stats.ready == 11, "it was not stored at all: nothing was tested"
            assert await broker.publish(sent) == [item.id for item in sent]
            assert (await direct.stats())[0].ready == 11
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


def test_a_silent_server_is_noticed(server: Server, impatient: None) -> None:
    """C17: half-open, as after a network failure: told within seconds, and used again when it answers."""

    async def main() -> None:
        with proxy_to(server.port) as proxy:
            broker = await connected(server.url.replace(str(server.port), str(proxy.port)))
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
