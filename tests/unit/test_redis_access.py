"""Getting in: users with few rights, passwords, TLS; and what is said of who is kept out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from services.base import Server, free_port
from services.certificates import make_certificate
from services.redis import RedisServer

from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.broker.redis import RedisBroker
from postroom.errors import BrokerUnavailable, ConfigurationError
from postroom.message import Failure, Message
from tests.servers import private, started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


async def live(url: str) -> list[str]:
    """The life of two messages, and what the doctor is worried about."""
    broker = RedisBroker(url)
    await broker.connect()
    try:
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish([Message(id=name, topic="q", name="n", body=b"1") for name in "ab"])
        consumer = await broker.consume("q")
        one, other = await consumer.receive(2, 5.0)
        consumer.started([one, other])
        assert await consumer.receive(1, 0.05) == []
        failure = Failure(attempt=1, reason="error")
        assert await consumer.settle([(one, Ack()), (other, Dead(failure))]) == [None, None]
        assert await broker.redrive("q", ["b"]) == ["b"]
        return [finding.title for finding in await broker.examine() if "may not run" in finding.detail]
    finally:
        await broker.close()


def test_the_rights_of_the_manual_are_enough(server: Server) -> None:
    with Redis.from_url(server.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "shop", "on", ">p@ss", "~{postroom}:*",
            "&{postroom}:*", "+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time",
            "+info", "+config|get",
        )  # fmt: skip
    assert asyncio.run(live(server.url.replace("redis://", "redis://shop:p%40ss@"))) == []


@pytest.mark.parametrize("rights", ["+@all", "&* +@all -pubsub"])
def test_who_may_not_listen_is_told_before_it_works(server: Server, rights: str) -> None:
    """Its death could not be told from a pause."""
    with Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "deaf", "reset", "on", ">pass", "~*", *rights.split())
    with pytest.raises(ConfigurationError, match=r"refuses us.*ACL"):
        asyncio.run(live(server.url.replace("redis://", "redis://deaf:pass@")))


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ("redis", "cluster=yes", "is in no cluster: remove cluster=yes"),
        ("rediss", "cafile=/nosuch/ca.pem", "cannot read /nosuch/ca.pem"),
    ],
)
def test_options_that_do_not_fit_the_server(server: Server, scheme: str, options: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        asyncio.run(live(f"{server.url.replace('redis', scheme, 1)}?{options}"))


def test_tls_where_there_is_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postroom.broker.redis.link.TIMEOUT", 0.5)
    with pytest.raises(BrokerUnavailable, match="may not speak TLS"):
        asyncio.run(live(server.url.replace("redis", "rediss", 1)))


@pytest.mark.parametrize("user", ["nobody:secret@", ":secret@", "shy:secret@"])
def test_who_is_kept_out_is_told_without_the_password(server: Server, user: str) -> None:
    with Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "shy", "on", ">secret", "~other:*", "+@all")
    with pytest.raises(ConfigurationError, match="refuses us") as error:
        asyncio.run(live(server.url.replace("redis://", f"redis://{user}")))
    assert "secret" not in f"{error.value}"


def test_a_database_that_is_not_there(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="DB index"):
        asyncio.run(live(f"{server.url}/99"))


def test_nobody_listens() -> None:
    with pytest.raises(BrokerUnavailable, match=r"redis://127\.0\.0\.1"):
        asyncio.run(live(f"redis://127.0.0.1:{free_port()}"))


def test_a_password_over_tls(tmp_path: Path) -> None:
    """With an authority of one's own, a certificate of the client, and a user; nobody else is believed, or let in."""
    made = make_certificate(tmp_path)
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", str(made.certificate), "--tls-key-file", str(made.key))
    with started(
        RedisServer(tmp_path / "redis", options=(*options, "--tls-ca-cert-file", str(made.certificate)))
    ) as server:
        with Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "shop", "on", ">p@ss", "~{postroom}:*", "&{postroom}:*", "+@all")
        shown = f"certfile={made.certificate}&keyfile={made.key}"
        believed = f"cafile={made.certificate}&{shown}"
        assert asyncio.run(live(f"rediss://shop:p%40ss@localhost:{port}?{believed}")) == []
        with pytest.raises(ConfigurationError, match="refuses us") as error:
            asyncio.run(live(f"rediss://shop:not-it@localhost:{port}?{believed}"))
        assert "not-it" not in f"{error.value}"
        with pytest.raises(BrokerUnavailable, match="certificate"):
            asyncio.run(live(f"rediss://shop:p%40ss@localhost:{port}?{shown}"))
