"""Getting in: TLS and passwords; and what is said of who is kept out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from services.base import free_port
from services.certificates import make_certificate
from services.rabbitmq import RabbitMQServer

from postroom.broker.amqp import AMQPBroker
from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.errors import BrokerUnavailable, ConfigurationError, MessageTooLarge
from postroom.message import Failure, Message
from tests.servers import started


class Place(NamedTuple):
    port: int
    authority: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where a server listens by TLS, that lets ``shop`` in with ``p@ss``."""
    made = make_certificate(tmp_path_factory.mktemp("certificate"))
    port = free_port()
    settings = {
        "listeners.ssl.1": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(made.certificate),
        "ssl_options.certfile": str(made.certificate),
        "ssl_options.keyfile": str(made.key),
        "max_message_size": "100000",
    }
    with started(RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"), settings=settings)) as server:
        assert isinstance(server, RabbitMQServer)
        server.control("add_user", "shop", "p@ss")
        server.control("set_permissions", "shop", ".*", ".*", ".*")
        yield Place(port, made.certificate)


async def live(url: str) -> None:
    """The life of two messages."""
    broker = AMQPBroker(url)
    try:
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish([Message(id=name, topic="q", name="n", body=b"1") for name in "ab"])
        consumer = await broker.consume("q")
        taken = []
        while len(taken) < 2:
            taken += await consumer.receive(2, 10.0)
        failure = Failure(attempt=1, reason="error")
        assert await consumer.settle([(taken[0], Ack()), (taken[1], Dead(failure))]) == [None, None]
        name = taken[1].message.id
        assert await broker.redrive("q", [name]) == [name]
    finally:
        await broker.close()


def test_a_password_over_tls(place: Place) -> None:
    asyncio.run(live(f"amqps://shop:p%40ss@127.0.0.1:{place.port}/?cafile={place.authority}"))


def test_a_wrong_password_is_told_without_it(place: Place) -> None:
    with pytest.raises(ConfigurationError, match="refuses this user") as error:
        asyncio.run(live(f"amqps://shop:not-it@127.0.0.1:{place.port}/?cafile={place.authority}"))
    assert "not-it" not in f"{error.value} {error.value.__cause__!r}"


def test_a_server_that_takes_less_than_usual(place: Place) -> None:
    """It hangs up on what is larger, and says how large that may be: from then on only that message is refused."""

    async def main() -> None:
        broker = AMQPBroker(f"amqps://shop:p%40ss@localhost:{place.port}/?cafile={place.authority}&namespace=small")
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        small = Message(id="small", topic="q", name="n", body=b"1")
        large = Message(id="large", topic="q", name="n", body=b"1" * 200_000)
        with pytest.raises(BrokerUnavailable, match="larger than"):
            await broker.publish([large])
        told = await broker.publish([small, large])
        assert (told[0], type(told[1])) == ("small", MessageTooLarge)
        await broker.close()

    asyncio.run(main())


def test_a_server_nobody_vouches_for(place: Place) -> None:
    with pytest.raises(BrokerUnavailable, match="certificate") as error:
        asyncio.run(live(f"amqps://shop:not-it@127.0.0.1:{place.port}/"))
    assert "not-it" not in f"{error.value}"
