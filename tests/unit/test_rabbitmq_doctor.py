"""What the doctor finds: on a real server that is set up wrongly, one thing at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import pytest
from services.rabbitmq import RabbitMQServer

from postroom.broker.amqp import AMQPBroker
from postroom.broker.amqp.address import parse
from postroom.broker.amqp.doctor import _transport, _user, _version
from postroom.broker.base import Subscription, Topic
from postroom.doctor import Finding
from postroom.errors import ConfigurationError
from postroom.message import Message, new_id
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        assert isinstance(made, RabbitMQServer)
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:8]}"


Planting = Callable[[AMQPBroker], Awaitable[None]]


async def nothing(_: AMQPBroker) -> None:
    """A sound server."""


def findings(server: RabbitMQServer, namespace: str, plant: Planting = nothing, user: str = "") -> dict[str, Finding]:
    url = f"{server.url}?namespace={namespace}"

    async def main() -> list[Finding]:
        broker = AMQPBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await plant(broker)
        if user:
            await broker.close()
            broker = AMQPBroker(url.replace("guest:guest", user))
            await broker.connect()
        try:
            return await broker.examine()
        finally:
            await broker.close()

    return {finding.title: finding for finding in asyncio.run(main())}


def test_nothing_is_wrong(server: RabbitMQServer, namespace: str) -> None:
    found = findings(server, namespace)
    assert {finding.level for finding in found.values()} == {"ok"}, found
    titles = {"version", "encryption", "user", "permissions", "alarms", "queues", "workers", "depth", "delays"}
    assert found.keys() == titles


def test_long_tasks_in_order(server: RabbitMQServer, namespace: str) -> None:
    async def plant(broker: AMQPBroker) -> None:
        await broker.declare([Topic(name="o", queue=True)], [Subscription(name="o", pattern="o", ordered=True)])

    found = findings(server, namespace, plant)["long tasks"]
    assert (found.level, "(o)" in found.detail) == ("warning", True)


def test_a_permission_is_missing(server: RabbitMQServer, namespace: str) -> None:
    server.control("add_user", namespace, "secret")
    server.control("set_permissions", namespace, ".*", "nothing", ".*")
    found = findings(server, namespace, user=f"{namespace}:secret")["permissions"]
    assert (found.level, "write" in found.detail) == ("error", True)
    assert f"set_permissions -p / {namespace}" in found.remedy
    assert "secret" not in repr(found)


def test_the_permissions_of_our_manual_do(server: RabbitMQServer, namespace: str) -> None:
    names = rf"^{namespace}[.:].*|amq\.default"
    server.control("add_user", namespace, "secret")
    server.control("set_permissions", namespace, names, names, names)
    found = findings(server, namespace, user=f"{namespace}:secret")
    assert {finding.level for finding in found.values()} == {"ok"}, found
    server.control("set_permissions", namespace, names, names, "nothing")
    with pytest.raises(ConfigurationError, match="a user needs configure, write and read: rabbitmqctl"):
        findings(server, namespace, user=f"{namespace}:secret")


@pytest.mark.parametrize(("what", "title"), [("{0}.q", "queues"), ("{0}.q:dead", "queues"), ("{0}:delay:7", "delays")])
def test_a_queue_was_deleted(server: RabbitMQServer, namespace: str, what: str, title: str) -> None:
    async def plant(broker: AMQPBroker) -> None:
        channel = await broker._reading.channel()
        await channel.call("queue_delete", queue=what.format(namespace))
        await channel.close()

    found = findings(server, namespace, plant)[title]
    assert (found.level, what.format(namespace) in found.detail) == ("error", True)


def test_nobody_consumes(server: RabbitMQServer, namespace: str) -> None:
    async def plant(broker: AMQPBroker) -> None:
        await broker.publish([Message(id=new_id(), topic="q", name="n", body=b"1")])

    assert findings(server, namespace, plant)["workers"].level == "warning"


def test_what_came_too_late(server: RabbitMQServer, namespace: str) -> None:
    """A delayed event whose last subscription has gone meanwhile."""

    async def plant(broker: AMQPBroker) -> None:
        await broker.declare([Topic(name="t")], [])
        later = time.time() + 0.1
        await broker.publish([Message(id=new_id(), topic="t", name="n", body=b"1", not_before=later)])
        await asyncio.sleep(0.6)

    found = findings(server, namespace, plant)["undeliverable"]
    assert (found.level, found.detail[:9]) == ("warning", "1 delayed")


def test_the_server_is_short_of_memory(server: RabbitMQServer, namespace: str) -> None:
    async def plant(_: AMQPBroker) -> None:
        await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.000001")

    try:
        assert findings(server, namespace, plant)["alarms"].level == "error"
    finally:
        server.control("set_vm_memory_high_watermark", "0.4")


@pytest.mark.parametrize(
    ("version", "product", "level"),
    [
        ("3.9.29", "RabbitMQ", "error"),
        ("3.13.1", "RabbitMQ", "ok"),
        ("4.3.0", "RabbitMQ", "ok"),
        ("1", "Other", "warning"),
    ],
)
def test_versions(version: str, product: str, level: str) -> None:
    assert _version({"version": version, "product": product}).level == level


@pytest.mark.parametrize(
    ("url", "levels"),
    [
        ("amqp://localhost", ("ok", "ok")),
        ("amqp://10.0.0.7", ("warning", "warning")),
        ("amqps://ann:x@mq.example.com", ("ok", "ok")),
        ("amqp://ann:x@mq.example.com", ("warning", "ok")),
    ],
)
def test_the_way_there(url: str, levels: tuple[str, str]) -> None:
    address = parse(url)
    assert (_transport(address).level, _user(address).level) == levels


def test_without_a_connection_there_is_nothing_to_see() -> None:
    assert asyncio.run(AMQPBroker("amqp://localhost:1").examine()) == []
