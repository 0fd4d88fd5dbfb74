"""The conformance suite on a RabbitMQ of today: 4.3 and newer, while another module has the 3.10 of Debian 12.

As a rule only what depends on the server is tried; with ``POSTROOM_WHOLE_SUITE=1`` in the environment, all.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from services.base import Server, free_port

import postroom.testing.conformance  # noqa: F401 -- fills the suite
from postroom import App, UnsupportedOperation, create_outbox
from postroom.broker.amqp import AMQPBroker, topology
from postroom.broker.base import PRIORITIES, Ack, Broker, Capabilities, Subscription, Topic
from postroom.message import Message, new_id
from postroom.store.outbox.relay import Relay
from postroom.testing.harness import Harness
from postroom.testing.suite import SUITE
from tests.conformance.test_rabbitmq import RabbitMQHarness
from tests.servers import private

_AREAS = ("dead_letters", "fencing", "retention", "timing")
_WHOLE = bool(os.environ.get("POSTROOM_WHOLE_SUITE"))
globals().update(
    {
        name.rpartition(".")[2]: test.run
        for name, test in SUITE.items()
        if _WHOLE or name.partition(".")[0] in _AREAS or "priorities" in test.needs
    }
)


class RabbitMQ4Harness(RabbitMQHarness):
    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(AMQPBroker.capabilities, priorities=PRIORITIES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq4", tmp_path_factory.mktemp("rabbitmq4")) as made:
        yield made


@pytest.fixture
def harness(server: Server) -> Harness:
    return RabbitMQ4Harness(f"{server.url}?namespace={_NAMESPACE}", server)


def test_the_delayed_do_not_wait_behind_the_urgent(harness: Harness) -> None:
    """All wait on the same ladder, where only what is next in a queue can be found to have waited long enough."""

    async def main() -> None:
        broker = await _opened(harness)
        consumer = await broker.consume(_QUEUE)
        published = time.time()
        usual = Message(id=new_id(), topic=_QUEUE, name="n", body=b"", not_before=published + 1.0)
        assert await broker.publish([usual]) == [usual.id]
        while time.time() < published + 10.0:
            # Each of them waits still when the first is due.
            due = time.time() + 1.0
            await broker.publish(
                [msgspec.structs.replace(usual, id=new_id(), priority=9, not_before=due) for _ in range(10)]
            )
            got = await consumer.receive(100, 0.05)
            await consumer.settle([(delivery, Ack()) for delivery in got])
            if usual.id in {delivery.message.id for delivery in got}:
                break
        assert 1.0 <= time.time() - published < 4.0
        await broker.close()

    asyncio.run(main())


def test_what_is_declared_can_be_read_any_number_of_times(harness: Harness) -> None:
    """C10: since 4.0 a queue drops by default what was given back twenty times, and whoever reads gives back."""

    async def main() -> None:
        broker = await _opened(harness)
        for _ in range(30):
            assert len(await broker.stats()) == 2
        await broker.close()

    asyncio.run(main())


def test_a_queue_of_an_older_server_is_told_of(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        broker = AMQPBroker(f"{server.url}?namespace=older")
        await broker.connect()
        channel = await broker._reading.channel()
        plain = {"x-queue-type": "quorum"}
        await channel.call("queue_declare", queue="older:topology", durable=True, arguments=plain)
        await channel.close()
        await broker.declare([Topic(name="old", queue=True)], [Subscription(name="old", pattern="old")])
        (command,) = [each.getMessage() for each in caplog.records if "set_policy" in each.getMessage()]
        policy = shlex.split(command.partition("rabbitmqctl ")[2])
        await asyncio.to_thread(server.control, *policy)  # type: ignore[attr-defined]
        for _ in range(30):
            assert [each.name for each in await broker.stats()] == ["old"]
        await broker.close()

    asyncio.run(main())


def test_an_ordered_queue_of_an_older_server_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the upgrade of the server the same app starts, also with one more task; what to do is told."""
    topics = [Topic(name=name, queue=True) for name in ("o", "new")]
    subscriptions = [Subscription(name="o", pattern="o", ordered=True), Subscription(name="new", pattern="new")]

    async def main() -> None:
        for step in (1, 1, 2):
            monkeypatch.setattr(topology, "version_of", lambda _, step=step: (3, 10) if step == 1 else (4, 3))
            broker = AMQPBroker(f"{server.url}?namespace=ordered")
            await broker.connect()
            await broker.declare(topics[:step], subscriptions[:step])
            told = [each.getMessage() for each in caplog.records if "ordered.o was made before" in each.getMessage()]
            assert len(told) == step - 1
            await broker.publish([Message(id=new_id(), topic="o", name="n", body=b"", key="k")])
            await broker.close()

    asyncio.run(main())


def test_nothing_urgent_where_there_is_an_order(harness: Harness) -> None:
    async def main() -> None:
        broker = await _opened(harness)
        urgent = Message(id=new_id(), topic=f"{_QUEUE}-ordered", name="n", body=b"", key="k", priority=1)
        told = await broker.publish([urgent, msgspec.structs.replace(urgent, topic=f"{_QUEUE}-topic")])
        assert [str(error) for error in told] == [
            f"priority=1: '{_QUEUE}-ordered' is ordered, and RabbitMQ would let it overtake its key; leave it out",
            f"priority=1: '{_QUEUE}-topic' is a topic, and in its ordered subscriptions it would overtake its key; "
            "leave it out",
        ]
        await broker.close()

    asyncio.run(main())


def test_the_urgent_go_through_an_outbox(server: Server, tmp_path: Path) -> None:
    """C13: whether there are priorities is asked of the server; while nobody can tell, they are refused."""
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        create_outbox(connection)
        with _shop(server.url) as app:
            send = app.tasks["send"].using(transaction=connection, priority=9)
            urgent = [send.enqueue().id, asyncio.run(send.aenqueue()).id]
            connection.commit()
            assert Relay(f"sqlite:///{tmp_path}/shop.db", app.outlet.send).run_once() == 2

            async def taken(broker: Broker) -> dict[str, int]:
                consumer = await broker.consume("urgent")
                found = await consumer.receive(1, 10.0)
                found += await consumer.receive(1, 10.0)
                await consumer.settle([(delivery, Ack()) for delivery in found])
                return {delivery.message.id: delivery.message.priority for delivery in found}

            assert app.thread.call(taken) == dict.fromkeys(urgent, 9)
        with _shop(f"amqp://127.0.0.1:{free_port()}") as app:
            send = app.tasks["send"].using(transaction=connection, priority=9)
            for enqueue in (send.enqueue, lambda: asyncio.run(send.aenqueue())):
                with pytest.raises(UnsupportedOperation, match="not known before it can be reached"):
                    enqueue()


def _shop(url: str) -> App:
    app = App(url)

    @app.task(queue="urgent")
    def send() -> None: ...

    return app


_QUEUE = "priorities"


async def _opened(harness: Harness) -> Broker:
    broker = harness.make_broker()
    await broker.connect()
    assert broker.capabilities.priorities
    names = [_QUEUE, f"{_QUEUE}-ordered"]
    await broker.declare(
        [*(Topic(name=name, queue=True) for name in names), Topic(name=f"{_QUEUE}-topic")],
        [Subscription(name=name, pattern=name, ordered=name.endswith("ordered")) for name in names],
    )
    return broker


_NAMESPACE = f"conformance-{uuid4().hex[:8]}"
