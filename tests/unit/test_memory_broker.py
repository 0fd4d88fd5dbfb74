"""What is particular to the memory broker; what every broker does is in the conformance suite."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any
from uuid import uuid4

import pytest

from postroom.broker.base import Ack, Dead, Delivery, Retry, Subscription, Topic
from postroom.broker.memory import MemoryBroker
from postroom.broker.routing import matches
from postroom.errors import BrokerClosed, ConfigurationError
from postroom.message import Failure, Message, new_id
from postroom.testing.clock import ManualClock

QUEUE = ([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])


def message(**options: Any) -> Message:
    return Message(**({"id": new_id(), "topic": "q", "name": "work", "body": b"{}"} | options))


def in_thread(coroutine: Coroutine[Any, Any, Any]) -> threading.Thread:
    thread = threading.Thread(target=asyncio.run, args=(coroutine,))
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("order.paid", "order.paid", True),
        ("order.paid", "order.paid.eu", False),
        ("order.*", "order.paid", True),
        ("order.*", "order", False),
        ("order.*", "order.paid.eu", False),
        ("order.#", "order", True),
        ("order.#", "order.paid.eu", True),
        ("order.#", "orders", False),
        ("#", "anything.at.all", True),
        ("#.eu", "eu", True),
        ("#.eu", "order.paid.eu", True),
        ("#.eu", "order.eu.paid", False),
        ("*.#.eu", "eu", False),
        ("*.#.eu", "order.eu", True),
        ("#.paid.#", "order.paid", True),
        ("#.#.#", "a", True),
        ("*", "a.b", False),
    ],
)
def test_patterns(pattern: str, topic: str, fits: bool) -> None:
    assert matches(pattern, topic) is fits


def test_a_name_is_shared_across_event_loops_and_threads() -> None:
    url = f"memory://{uuid4().hex}"
    got: list[Delivery] = []
    waits = threading.Event()

    async def consume() -> None:
        broker = MemoryBroker(url)
        await broker.connect()
        await broker.declare(*QUEUE)
        consumer = await broker.consume("q")
        asyncio.get_running_loop().call_soon(waits.set)
        got.extend(await consumer.receive(1, 30.0))
        await broker.close()

    async def produce() -> None:
        broker = MemoryBroker(url)
        await broker.connect()
        await broker.publish([message(body=b"hello")])
        await broker.close()

    thread = in_thread(consume())
    assert waits.wait(10)
    asyncio.run(produce())
    thread.join(10)
    assert [delivery.message.body for delivery in got] == [b"hello"]


def test_without_a_name_nothing_is_shared() -> None:
    async def main() -> None:
        one, other = MemoryBroker(), MemoryBroker()
        await one.connect()
        await other.connect()
        await one.declare(*QUEUE)
        assert [stats.name for stats in await one.stats()] == ["q"]
        assert await other.stats() == []

    asyncio.run(main())


@pytest.mark.parametrize("url", ["sqlite:///x.db", "memory:", "memory://a/b", "memory://a?size=1"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory://name"):
        MemoryBroker(url)


def test_it_wants_to_be_connected_first() -> None:
    async def main() -> None:
        with pytest.raises(BrokerClosed, match="connect"):
            await MemoryBroker().stats()

    asyncio.run(main())


def test_what_is_done_is_not_held_in_memory() -> None:
    """Neither copies, nor alarms, nor idempotency keys remain when results and windows are over."""

    async def main() -> None:
        clock = ManualClock()
        broker = MemoryBroker(clock=clock)
        await broker.connect()
        await broker.declare(*QUEUE)
        consumer = await broker.consume("q")
        for _ in range(30):
            batch = [message(result_ttl=0.0, idempotency_key=new_id(), dedup_window=60.0) for _ in range(100)]
            batch += [message(result_ttl=60.0, expires_at=clock.now() + 1e9) for _ in range(100)]
            await broker.publish(batch)
            await consumer.settle([(delivery, Ack(b"1")) for delivery in await consumer.receive(200, 0.0)])
        state = broker._state
        assert state is not None
        assert len(state.by_id) == 3000
        kept = state.subscriptions["q"]
        assert not any(copy.message.body for copy in kept.copies.values()), "the bodies of what is done"
        assert not kept.waiters
        assert len(state.alarms._heap) < 10_000
        await clock.advance(61.0)
        assert await broker.jobs.search() == []
        assert not state.by_id
        assert not state.subscriptions["q"].copies
        assert not state._dedup._firsts
        assert len(state.alarms._heap) < 2_000

    asyncio.run(main())


def test_the_head_of_a_line_gives_way_to_an_older_redriven_message_when_it_is_retried() -> None:
    async def main() -> None:
        clock = ManualClock()
        broker = MemoryBroker(clock=clock)
        await broker.connect()
        await broker.declare([], [Subscription(name="s", pattern="t", ordered=True)])
        await broker.declare([Topic(name="t")], [])
        first, second = message(topic="t", key="k"), message(topic="t", key="k")
        await broker.publish([first, second])
        consumer = await broker.consume("s")
        failure = Failure(attempt=1, reason="error")
        await consumer.settle([((await consumer.receive(1, 0.0))[0], Dead(failure))])
        (running,) = await consumer.receive(1, 0.0)
        await broker.redrive("s", [first.id])
        assert await consumer.receive(1, 0.0) == []
        await consumer.settle([(running, Retry(delay=0.0, failure=failure))])
        assert [d.message.id for d in await consumer.receive(5, 0.0)] == [first.id]

    asyncio.run(main())
