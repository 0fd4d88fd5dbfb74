"""Getting in: TLS and passwords; and what is said of who is kept out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import quote
from uuid import uuid4

import pytest
from services.certificates import Certificate, make_certificate
from services.kafka import PASSWORD, USER, KafkaServer

from postroom.broker.base import Ack, Dead, Subscription, Topic
from postroom.broker.kafka import KafkaBroker
from postroom.errors import ConfigurationError
from postroom.message import Failure, Message
from tests.servers import started


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def place(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What stands behind the user in a URL."""
    with started(KafkaServer(tmp_path_factory.mktemp("kafka"), certificate=certificate)) as server:
        assert isinstance(server, KafkaServer)
        yield f"127.0.0.1:{server.secure_port}?timeout=3"


async def live(url: str) -> None:
    """The life of two messages."""
    broker = KafkaBroker(f"{url}&namespace=t{uuid4().hex[:12]}&partitions=1")
    try:
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        await broker.publish([Message(id=name, topic="q", name="n", body=b"1") for name in "ab"])
        consumer = await broker.consume("q")
        one, other = await consumer.receive(2, 20.0)
        failure = Failure(attempt=1, reason="error")
        assert await consumer.settle([(one, Ack()), (other, Dead(failure))]) == [None, None]
        assert await broker.redrive("q", ["b"]) == ["b"]
    finally:
        await broker.close()


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_a_password_over_tls(place: str, certificate: Certificate, mechanism: str) -> None:
    who = f"{USER}:{quote(PASSWORD, safe='')}"
    asyncio.run(live(f"kafka+ssl://{who}@{place}&mechanism={mechanism}&ca={certificate.certificate}"))


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_a_wrong_password_is_told_without_it(place: str, certificate: Certificate, mechanism: str) -> None:
    url = f"kafka+ssl://{USER}:not-it@{place}&mechanism={mechanism}&ca={certificate.certificate}"
    with pytest.raises(ConfigurationError, match=r"(?i)authentication") as error:
        asyncio.run(live(url))
    assert "not-it" not in f"{error.value} {error.value.__cause__!r}"


def test_a_server_nobody_vouches_for(place: str) -> None:
    with pytest.raises(ConfigurationError, match=r"certificate .*\?ca=") as error:
        asyncio.run(live(f"kafka+ssl://{USER}:not-it@{place}"))
    assert "not-it" not in f"{error.value}"
