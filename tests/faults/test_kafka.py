"""Kafka under fault: workers that are killed, frozen or kill themselves; a server or its answers that go away."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest
from services.base import Server
from services.kafka import KafkaServer

from postroom.broker.base import Ack, Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.broker.kafka import KafkaBroker
from postroom.errors import BrokerUnavailable
from postroom.message import Failure, Message, new_id
from tests.conftest import wait_until
from tests.faults.processes import Stage, stage, unfinished, wait_until_done
from tests.faults.proxy import Proxy, proxy_to
from tests.faults.scenarios import (
    FIVE,
    freeze_a_worker,
    freeze_the_server,
    killers_among_innocents,
    restart_the_server_under_load,
)
from tests.servers import private, started

pytestmark = pytest.mark.server

FAILURE = Failure(attempt=1, reason="error", error="ValueError")
SESSION = 2
"""Seconds after which the group takes a silent worker for dead; the server allows no less than it is told to."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        yield made


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Iterator[Stage]:
    url = f"{server.url}?namespace=t{uuid4().hex[:12]}&session={SESSION}"
    with stage(tmp_path, lease=3.0, url=url) as made:
        yield made


# Workers


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killing_workers_at_work_loses_nothing(faults: Stage, tasks: ModuleType) -> None:
    """I1, I3, I6, C4: done = sent; a second start only after a death, and only of what was in flight then."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(10_000))]
    workers = [faults.worker("50") for _ in range(3)]
    killed = 0
    deadline = time.monotonic() + 150
    while len(faults.counts("end")) < len(ids):
        assert time.monotonic() < deadline, (tasks.app.stats(), faults.tail())
        time.sleep(0.1)
        if killed < 4 and _at_work(faults, workers[0].pid) >= 200:
            faults.kill(workers.pop(0))
            killed += 1
            workers.append(faults.worker("50"))
    wait_until_done(tasks.app, faults, 30)
    assert killed >= 3, "the jobs were done before the workers could be killed"
    assert set(faults.counts("end")) == set(ids)
    assert tasks.app.dead_letters("default").list() == []
    again = sum(faults.counts("start").values()) - len(ids)
    print(f"{again} of {len(ids)} started again, after {killed} deaths")
    assert again > 0, "no death hit a worker at work"
    # A death and a new member make up to three rebalances; each repeats at most what three workers had in flight.
    assert again <= killed * 3 * 3 * 50


def _at_work(faults: Stage, pid: int) -> int:
    """How many jobs this process has begun."""
    return sum(record["event"] == "start" and record["pid"] == pid for record in faults.records())


@pytest.mark.timeout(240)
def test_killers_among_innocents(faults: Stage, tasks: ModuleType) -> None:
    """I11b, C7.

    A death within the milliseconds that the note of a start takes, longer during a rebalance, is not charged: then
    there is one start more, after which it is a suspect, and of a suspect the note comes first.
    """
    started = killers_among_innocents(faults, tasks)
    assert all(set(attempts) == set(FIVE) and len(attempts) <= 6 for attempts in started), started


def test_a_frozen_worker_is_fenced(faults: Stage, tasks: ModuleType) -> None:
    """I8, C5: frozen past its session."""

    def until_its_start_is_noted() -> None:
        # Once a second job is settled, the commit that says so has told of the first one's start, too.
        second = tasks.block.enqueue(0.0)
        faults.wait_for("end", second.id)
        wait_until(lambda: unfinished(tasks.app) == 1, "the second job is settled")

    freeze_a_worker(faults, tasks, pause=3.0, while_it_runs=until_its_start_is_noted)


def test_workers_that_come_and_go_lose_nothing(faults: Stage, tasks: ModuleType) -> None:
    """F12, I24: one rebalance after the other, each of a graceful stop: all is done, nothing is charged."""
    ids = [job.id for job in tasks.work.enqueue_many(tasks.work.call(0.05) for _ in range(1500))]
    workers = [faults.worker("10") for _ in range(2)]
    deadline = time.monotonic() + 90
    while len(faults.counts("end")) < len(ids):
        assert time.monotonic() < deadline, (tasks.app.stats(), faults.tail())
        time.sleep(1.0)
        leaving = workers.pop(0)
        # Before that it has not yet set up what a signal does.
        faults.wait_for_log(rf"worker {leaving.pid} works on")
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(20) == 0
        faults.workers.remove(leaving)
        workers.append(faults.worker("10"))
    wait_until_done(tasks.app, faults, 30)
    assert set(faults.counts("end")) == set(ids)
    assert {record["attempt"] for record in faults.records()} == {1}


# The server


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_server_goes_away_under_load(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """C1, C17."""
    restart_the_server_under_load(server, faults, tasks)


@pytest.mark.timed
def test_a_worker_outlives_a_frozen_server(server: Server, faults: Stage, tasks: ModuleType) -> None:
    """C17. Both the client and the group have to notice, each with time-outs of its own."""
    freeze_the_server(server, faults, tasks, busy=1.5, timeout=60)


# Answers that are lost


class Desk:
    """A broker behind a proxy, with a queue."""

    def __init__(self, broker: KafkaBroker, proxy: Proxy) -> None:
        self.broker = broker
        self.proxy = proxy

    def message(self) -> Message:
        return Message(id=new_id(), topic="desk", name="work", body=b'{"n": 1}', created_at=time.time())

    async def take(self, consumer: Consumer, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        async with asyncio.timeout(30):
            while len(taken) < count:
                try:
                    taken += await consumer.receive(count - len(taken), 5.0)
                except BrokerUnavailable:
                    await asyncio.sleep(0.1)
        return taken

    async def held(self) -> dict[str, int]:
        (stats,) = await self.broker.stats()
        return {name: count for name in ("ready", "delayed", "running", "dead") if (count := getattr(stats, name))}


Play = Callable[[Callable[[Desk], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KafkaServer, Proxy]]:
    """A server that sends its clients to the proxy."""
    with proxy_to(0) as proxy:
        made = KafkaServer(tmp_path_factory.mktemp("kafka"), advertised=proxy.port)
        proxy.target = made.port
        with started(made):
            yield made, proxy


@pytest.fixture
def play(behind: tuple[KafkaServer, Proxy]) -> Play:
    server, proxy = behind
    url = f"{server.url}?namespace=t{uuid4().hex[:12]}&timeout=4&session=10"

    async def run(scenario: Callable[[Desk], Awaitable[None]]) -> None:
        broker = KafkaBroker(url)
        await broker.connect()
        try:
            await broker.declare([Topic(name="desk", queue=True)], [Subscription(name="desk", pattern="desk")])
            await broker.publish([Message(id="first", topic="desk", name="work", body=b"{}")])
            consumer = await broker.consume("desk")
            await consumer.settle([(delivery, Ack()) for delivery in await consumer.receive(1, 20)])
            await consumer.close()
            await scenario(Desk(broker, proxy))
        finally:
            proxy.silent, proxy.lose_replies, proxy.cut_on = False, 0, None
            await broker.close()

    return lambda scenario: asyncio.run(run(scenario))


def test_the_answer_to_a_publish_is_lost(play: Play) -> None:
    """C1: the idempotent producer asks again, and the server knows it: one message."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        desk.proxy.lose_replies = 1
        assert await desk.broker.publish([message]) == [message.id]
        assert desk.proxy.lose_replies == 0, "no answer was lost"
        consumer = await desk.broker.consume("desk")
        assert [delivery.message for delivery in await desk.take(consumer, 1)] == [message]
        assert await consumer.receive(1, 1.0) == []

    play(scenario)


def test_no_answer_to_a_publish(play: Play) -> None:
    """C1: what is not confirmed in time is told, and never as confirmed; again with the same id it is."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        desk.proxy.silent = True
        with pytest.raises(BrokerUnavailable):
            await desk.broker.publish([message])
        desk.proxy.silent = False
        assert await desk.broker.publish([message]) == [message.id]
        consumer = await desk.broker.consume("desk")
        assert (await desk.take(consumer, 1))[0].message == message

    play(scenario)


def test_connections_break_while_messages_are_settled(play: Play) -> None:
    """C2, C17: settled in the end, whether the answer, the request or the connection was lost."""

    async def scenario(desk: Desk) -> None:
        sent = [desk.message() for _ in range(20)]
        await desk.broker.publish(sent)
        consumer = await desk.broker.consume("desk")
        seen: list[str] = []
        while len(set(seen)) < 20:
            for delivery in await desk.take(consumer, 1):
                desk.proxy.cut()
                for _ in range(100):
                    try:
                        (refusal,) = await consumer.settle([(delivery, Ack())])
                        break
                    except BrokerUnavailable:
                        await asyncio.sleep(0.2)
                else:
                    raise AssertionError("it was never settled")
                if refusal is None:
                    seen.append(delivery.message.id)
        assert sorted(seen) == sorted(message.id for message in sent), "what was settled came again"
        assert await desk.held() == {}

    play(scenario)


@pytest.mark.parametrize("outcome", [Retry(delay=0.0, failure=FAILURE), Dead(FAILURE)], ids=["retry", "dead"])
def test_a_crash_between_copy_and_commit(play: Play, outcome: Retry | Dead) -> None:
    """C2: the copy is confirmed, the original is not done yet: both are there, neither is lost."""

    async def scenario(desk: Desk) -> None:
        message = desk.message()
        await desk.broker.publish([message])
        consumer = await desk.broker.consume("desk", lease=60.0)
        (delivery,) = await desk.take(consumer, 1)
        # Commits carry the text of the ledger; nothing else does.
        desk.proxy.cut_on = b"p1;"
        with pytest.raises(BrokerUnavailable):
            await consumer.settle([(delivery, outcome)])
        copies = {"dead": 1} if isinstance(outcome, Dead) else {"ready": 1}
        assert await desk.held() == {"running": 1, **copies}
        desk.proxy.cut_on = None
        assert await consumer.settle([(delivery, outcome)]) == [None]
        assert await desk.held() == copies

    play(scenario)


def test_a_redrive_that_dies_half_way(play: Play) -> None:
    """C8, I14: each letter is in one of the two places, or for a while in both; a second redrive finishes the first."""

    async def scenario(desk: Desk) -> None:
        messages = [desk.message() for _ in range(3)]
        ids = [message.id for message in messages]
        await desk.broker.publish(messages)
        consumer = await desk.broker.consume("desk")
        await consumer.settle([(delivery, Dead(FAILURE)) for delivery in await desk.take(consumer, 3)])
        redriving = asyncio.create_task(desk.broker.redrive("desk", ids))
        taken = await desk.take(consumer, 3)
        redriving.cancel()
        await asyncio.gather(redriving, return_exceptions=True)
        assert sorted(delivery.message.id for delivery in taken) == sorted(ids)
        dead = {letter.message.id for letter in await desk.broker.dead_letters("desk")}
        assert dead <= set(ids)
        await desk.broker.redrive("desk", ids)
        assert await desk.broker.dead_letters("desk") == []

    play(scenario)
