"""What is done to workers and servers, whatever the broker. Its own bounds are told by the tests of each broker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, TypeVar

import pytest
from services.base import Server

from postroom.broker.base import Broker, Consumer, Subscription, Topic
from postroom.errors import BrokerUnavailable
from postroom.message import JobRecord, JobState, Message, new_id
from tests.conftest import wait_until
from tests.faults.processes import Stage, records_of, states, unfinished, wait_until_done
from tests.faults.proxy import Proxy

FIVE = [1, 2, 3, 4, 5]
"""The attempts of what kills whoever runs it."""

# Workers


def all_ended(faults: Stage, ids: Sequence[str], timeout: float) -> None:
    """All is done, and done once. Where only the journal knows what other processes still run, it is asked first."""
    wait_until(lambda: set(faults.counts("end")) >= set(ids), f"all ended: {faults.tail()}", timeout)
    assert set(faults.counts("end")) == set(ids)


def all_succeeded(faults: Stage, tasks: ModuleType, ids: Sequence[str], timeout: float) -> None:
    """All is done, nothing is left over, and the broker says so where it keeps jobs."""
    all_ended(faults, ids, timeout)
    wait_until_done(tasks.app, faults, 30)
    if keeps_jobs(tasks):
        assert states(tasks.app, list(ids)) == {JobState.SUCCEEDED: len(ids)}


def keeps_jobs(tasks: ModuleType) -> bool:
    return bool(tasks.app.make_broker().capabilities.jobs)


class Killing(NamedTuple):
    """Workers that were killed one after the other."""

    ids: list[str]
    workers: set[int]
    killed: set[int]


def kill_now_and_then(
    faults: Stage,
    tasks: ModuleType,
    *,
    jobs: int,
    pause: float,
    workers: int,
    concurrency: int,
    kills: int,
    every: int,
) -> Killing:
    """The oldest worker is killed whenever so many more jobs are done. All is done, and a job was started again only
    when the process that had it was killed."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(pause) for _ in range(jobs))]
    running = [faults.worker(str(concurrency)) for _ in range(workers)]
    made = {worker.pid for worker in running}
    killed: set[int] = set()
    for _ in range(kills):
        goal = len(faults.counts("end")) + every
        wait_until(lambda goal=goal: len(faults.counts("end")) >= goal, f"work goes on: {faults.tail()}", 120)  # type: ignore[misc]
        victim = running.pop(0)
        killed.add(victim.pid)
        faults.kill(victim)
        running.append(faults.worker(str(concurrency)))
        made.add(running[-1].pid)
    all_succeeded(faults, tasks, ids, 120)
    unexplained = {job_id: ran_in for job_id, ran_in in faults.holders(made).items() if not set(ran_in[:-1]) <= killed}
    assert not unexplained, "a job ran twice although nobody who held it died"
    assert tasks.app.dead_letters("default").list() == []
    return Killing(ids, made, killed)


def seconds_to_redelivery(faults: Stage, tasks: ModuleType) -> float:
    """From the death of a worker until the other one starts what it had. It is charged once."""
    workers = {worker.pid: worker for worker in (faults.worker("5"), faults.worker("5"))}
    first = tasks.block.enqueue(0.0)
    faults.wait_for("end", first.id)
    job = tasks.block.enqueue(0.5)
    (start,) = faults.wait_for("start", job.id)
    killed_at = time.monotonic()
    faults.kill(workers[start["pid"]])
    again = faults.wait_for("start", job.id, times=2)[1]
    assert again["attempt"] == 2
    faults.wait_for("end", job.id)
    if keeps_jobs(tasks):
        assert job.result(timeout=20) == "done"
        assert [failure.reason for failure in records_of(tasks.app, job.id).failures] == ["worker_lost"]
    took: float = again["t"] - killed_at
    print(f"started again {took:.2f} s after the kill")
    return took


def killers_among_innocents(
    faults: Stage, tasks: ModuleType, *, healthy: int = 200, killers: int = 3
) -> list[list[int]]:
    """Exactly the killers end as dead letters, each of five deaths. Returns which attempts of each were started."""
    innocent = [tasks.healthy.call() for _ in range(healthy)]
    guilty = [tasks.killer.call() for _ in range(killers)]
    mixed, gap = list(innocent), healthy // (killers + 1)
    for number, call in enumerate(guilty, 1):
        mixed.insert(number * gap + number - 1, call)
    tasks.healthy.enqueue_many(mixed)
    bad = sorted(call.message.id for call in guilty)
    workers = [faults.worker("50") for _ in range(2)]
    deadline = time.monotonic() + 150
    while len(faults.counts("end")) < healthy or _dead(tasks) != bad:
        assert time.monotonic() < deadline, (tasks.app.stats(), faults.tail())
        _replace_the_dead(faults, workers)
        time.sleep(0.1)
    all_succeeded(faults, tasks, [call.message.id for call in innocent], 1)
    letters = tasks.app.dead_letters("mixed").list()
    assert all([failure.reason for failure in letter.failures] == ["worker_lost"] * 5 for letter in letters)
    if keeps_jobs(tasks):
        assert states(tasks.app, bad) == {JobState.DEAD: killers}
    started = [record for record in faults.records() if record["event"] == "start"]
    return [sorted(record["attempt"] for record in started if record["id"] == job_id) for job_id in bad]


def few_starts_and_twins(started: Sequence[Sequence[int]]) -> None:
    """Where a copy is stored before its original goes, and all that a dead process held is charged.

    What only waited in a process that died has that attempt without a start. Who dies between copy and original leaves
    both: twins, which are counted each by itself, and seen by an attempt that was started twice.
    """
    for attempts in started:
        assert set(attempts) <= set(FIVE), started
        assert len(attempts) >= 3, started
        assert len(attempts) - len(set(attempts)) <= 2, started


def _dead(tasks: ModuleType) -> list[str]:
    return sorted(letter.message.id for letter in tasks.app.dead_letters("mixed").list())


def _replace_the_dead(faults: Stage, workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in list(workers):
        if worker.poll() is not None:
            workers.remove(worker)
            faults.workers.remove(worker)
            workers.append(faults.worker("50"))


def freeze_a_worker(
    faults: Stage, tasks: ModuleType, *, pause: float, while_it_runs: Callable[[], None] = lambda: None
) -> float:
    """Its message runs elsewhere; thawed, it settles nothing. Returns after how many seconds it was started again."""
    first = faults.worker("5")
    job = tasks.block.enqueue(pause)
    faults.wait_for("start", job.id)
    while_it_runs()
    os.kill(first.pid, signal.SIGSTOP)
    frozen_at = time.monotonic()
    faults.worker("5")
    again = faults.wait_for("start", job.id, times=2)[1]
    faults.wait_for("end", job.id)
    wait_until_done(tasks.app, faults, 20)
    before = _record(tasks, job.id)
    os.kill(first.pid, signal.SIGCONT)
    faults.wait_for_log("lost the lease|not settled")
    starts = [record for record in faults.records() if (record["event"], record["id"]) == ("start", job.id)]
    assert [record["attempt"] for record in starts] == [1, 2]
    assert unfinished(tasks.app) == 0
    assert tasks.app.dead_letters("threads").list() == []
    assert before == _record(tasks, job.id)
    if before is not None:
        assert (before.state, before.attempt) == (JobState.SUCCEEDED, 2)
        assert [failure.reason for failure in before.failures] == ["worker_lost"]
    took: float = again["t"] - frozen_at
    return took


def _record(tasks: ModuleType, job_id: str) -> JobRecord | None:
    return records_of(tasks.app, job_id) if keeps_jobs(tasks) else None


# Servers


def kill_the_server_under_load(
    server: Server, faults: Stage, tasks: ModuleType, *, jobs: int, workers: int, concurrency: int, away: float
) -> list[str]:
    """It is gone for so many seconds; work goes on within 30 s, and all is done. Returns the ids."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(jobs))]
    for _ in range(workers):
        faults.worker(str(concurrency))
    faults.wait_for("end", ids[100])
    server.kill()
    time.sleep(away)
    server.start()
    before = len(faults.counts("end"))
    back_at = time.monotonic()
    wait_until(lambda: len(faults.counts("end")) > before + 50, f"resumed: {faults.tail()}", 30)
    print(f"resumed {time.monotonic() - back_at:.1f} s after the server was back")
    all_succeeded(faults, tasks, ids, 90)
    return ids


def restart_the_server_under_load(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """Twice, while a producer goes on: whatever was confirmed is done, at the latest 30 s after the last restart."""
    for _ in range(2):
        faults.worker("20")
    deadline = time.monotonic() + 30
    while len({record["pid"] for record in faults.records()}) < 2:
        assert time.monotonic() < deadline, faults.tail()
        tasks.work.enqueue(0.2)
        time.sleep(0.1)
    confirmed: list[str] = []
    for turn in range(20):
        confirmed += _enqueued_at_last(tasks)
        if turn in (5, 12):
            server.restart()
    back_at = time.monotonic()
    wait_until(lambda: set(confirmed) <= set(faults.counts("end")), f"all are done: {faults.tail()}", 30)
    print(f"all done {time.monotonic() - back_at:.1f} s after the last restart")
    assert len(confirmed) == 400
    wait_until_done(tasks.app, faults, 30)


def _enqueued_at_last(tasks: ModuleType) -> list[str]:
    calls = [tasks.work.call(0.01) for _ in range(20)]
    for _ in range(60):
        try:
            return [job.id for job in tasks.work.enqueue_many(calls)]
        except BrokerUnavailable:
            time.sleep(0.2)
    raise AssertionError("the producer never came back")


def freeze_the_server(server: Server, faults: Stage, tasks: ModuleType, *, busy: float, timeout: float) -> None:
    """As if the network were gone: meanwhile a worker takes at most so many seconds of CPU, and then it goes on."""
    worker = faults.worker("5")
    first = tasks.work.enqueue(0.0)
    faults.wait_for("end", first.id)
    server.pause()
    before = faults.cpu_seconds(worker.pid)
    time.sleep(14)
    used = faults.cpu_seconds(worker.pid) - before
    server.resume()
    assert used < busy, "a busy loop while the server is away"
    second = tasks.work.enqueue(0.0)
    faults.wait_for("end", second.id, timeout=timeout)


# A broker in this process

AnyBroker = TypeVar("AnyBroker", bound=Broker)
QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


def message(**options: object) -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}", **options)  # type: ignore[arg-type]


async def ready(broker: AnyBroker) -> AnyBroker:
    """Connected, and with the queue ``q``."""
    await broker.connect()
    await broker.declare(*QUEUE)
    return broker


async def lose_the_answer_to_a_publish(through: Broker, proxy: Proxy, direct: Broker) -> None:
    """It is stored, the caller is told that nothing is known, publishes it again: there is no second message."""
    # The first of all may have several answers, for what the server has to learn only once.
    await through.publish([message()])
    for _ in range(10):
        before = (await direct.stats())[0].ready
        sent = [message() for _ in range(10)]
        proxy.lose_replies = 1
        try:
            await through.publish(sent)
        except BrokerUnavailable:
            break
        # The answer to something else, a hint to consumers, was lost instead.
    else:
        pytest.fail("no publish lost its answer")
    assert (await direct.stats())[0].ready == before + 10, "it was not stored at all: nothing was tested"
    assert await through.publish(sent) == [item.id for item in sent]
    assert (await direct.stats())[0].ready == before + 10


async def silence_the_server(broker: Broker, proxy: Proxy, *, within: float) -> None:
    """Half-open, as after a network failure: told within so many seconds, and used again when it answers."""
    consumer = await broker.consume("q")
    receiving = asyncio.create_task(consumer.receive(1, None))
    await asyncio.sleep(0.2)
    proxy.silent = True
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        await receiving
    assert time.monotonic() - begin < within
    proxy.silent = False
    await broker.publish([message()])
    assert len(await consumer.receive(1, 10.0)) == 1


async def refused_without_a_busy_loop(consumer: Consumer) -> None:
    """The server is away: each receive says so, and costs nothing."""
    begin = time.process_time()
    for _ in range(3):
        with pytest.raises(BrokerUnavailable):
            await consumer.receive(1, 5.0)
        await asyncio.sleep(1.0)
    assert time.process_time() - begin < 0.5
