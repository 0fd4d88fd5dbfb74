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
from postroom.errors import BrokerUnavailable, ConfigurationError, MessageTooLarge, PostroomError
from postroom.message import Failure, Message
from tests.servers import started


class Place(NamedTuple):
    server: RabbitMQServer
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
        yield Place(server, port, made.certificate)


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


def test_a_certificate_of_our_own(tmp_path: Path) -> None:
    """A server that lets in nobody without one."""
    made = make_certificate(tmp_path)
    ours = make_certificate(tmp_path / "ours", made)
    port = free_port()
    settings = {
        "listeners.ssl.1": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(made.certificate),
        "ssl_options.certfile": str(made.certificate),
        "ssl_options.keyfile": str(made.key),
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "true",
    }
    url = f"amqps://guest:guest@127.0.0.1:{port}/?cafile={made.certificate}"
    with started(RabbitMQServer(tmp_path / "rabbitmq", settings=settings)):
        asyncio.run(live(f"{url}&certfile={ours.certificate}&keyfile={ours.key}"))
        with pytest.raises(BrokerUnavailable):
            asyncio.run(live(url))


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


def test_a_virtual_host_that_does_not_exist(place: Place) -> None:
    with pytest.raises(ConfigurationError, match="there is no virtual host 'nowhere'"):
        asyncio.run(live(f"{place.server.url}nowhere"))


def test_a_virtual_host_for_others(place: Place) -> None:
    place.server.control("add_vhost", "theirs")
    with pytest.raises(
        ConfigurationError, match="may not enter the virtual host: rabbitmqctl set_permissions -p theirs"
    ):
        asyncio.run(live(f"{place.server.url}theirs".replace("guest:guest", "shop:p%40ss")))


@pytest.mark.parametrize("missing", ["configure", "write", "read"])
def test_what_a_user_may_not_do_is_told(place: Place, missing: str) -> None:
    """Also by whoever only publishes, or takes what was declared before."""
    url = f"{place.server.url}?namespace=few{missing}"
    asyncio.run(live(url))
    names = rf"^few{missing}[.:].*|amq\.default"
    place.server.control("add_user", missing, "secret")
    granted = [names if each != missing else "nothing" for each in ("configure", "write", "read")]
    place.server.control("set_permissions", missing, *granted)

    async def publish() -> None:
        broker = AMQPBroker(url.replace("guest:guest", f"{missing}:secret"))
        try:
            await broker.connect()
            await broker.publish([Message(id="c", topic="q", name="n", body=b"1")])
            await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        finally:
            await broker.close()

    with pytest.raises(PostroomError, match=r"ACCESS_REFUSED.*a user needs configure, write and read") as error:
        asyncio.run(publish())
    assert f"rabbitmqctl set_permissions -p / {missing} '{names}' '{names}' '{names}'" in str(error.value)
    assert isinstance(error.value, ConfigurationError | BrokerUnavailable)
    assert "secret" not in str(error.value)
