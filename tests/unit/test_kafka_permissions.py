"""A user who may not do everything: it is told, nothing waits for ever, and what is allowed later works then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from services.certificates import Certificate, make_certificate
from services.kafka import PASSWORD, USER, KafkaServer

from postroom.broker.base import Ack
from postroom.errors import BrokerUnavailable, ConfigurationError, PostroomError
from postroom.message import Message, new_id
from tests.kafka import namespace, opened
from tests.servers import started

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def server(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with started(KafkaServer(tmp_path_factory.mktemp("kafka"), certificate=certificate)) as server:
        assert isinstance(server, KafkaServer)
        yield server


@pytest.fixture
def url(server: KafkaServer, certificate: Certificate) -> str:
    """As the user, in a namespace of its own."""
    who = f"{USER}:{quote(PASSWORD, safe='')}"
    where = f"kafka+ssl://{who}@127.0.0.1:{server.secure_port}?ca={certificate.certificate}"
    return f"{where}&{namespace()}&partitions=1&timeout=3&session=2"


@contextmanager
def denied(server: KafkaServer, *what: tuple[ResourceType, str, AclOperation]) -> Iterator[None]:
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{server.port}"})
    bindings = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation, AclPermissionType.DENY)
        for kind, name, operation in what
    ]
    for future in admin.create_acls(bindings).values():
        future.result()
    try:
        yield
    finally:
        filters = [
            AclBindingFilter(kind, name, ResourcePatternType.LITERAL, None, None, operation, AclPermissionType.DENY)
            for kind, name, operation in what
        ]
        for future in admin.delete_acls(filters).values():
            future.result()


def message() -> Message:
    return Message(id=new_id(), topic="q", name="work", body=b"{}")


NO_PRODUCER = (
    (ResourceType.BROKER, "kafka-cluster", AclOperation.IDEMPOTENT_WRITE),
    (ResourceType.TOPIC, "*", AclOperation.WRITE),
)


def test_who_may_not_publish_is_told_and_works_once_it_is_allowed(server: KafkaServer, url: str) -> None:
    """C1: a producer that has failed for good is replaced, and nobody waits for its confirmations."""

    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await broker._sender.close()  # The next one will ask for its id while it may not have one.
            with denied(server, *NO_PRODUCER):
                async with asyncio.timeout(20):
                    with pytest.raises((ConfigurationError, BrokerUnavailable), match=r"(?i)authorization|fatal"):
                        await broker.publish([message()])
            sent = message()
            for _ in range(50):
                try:
                    assert await broker.publish([sent]) == [sent.id]
                    break
                except PostroomError:
                    await asyncio.sleep(0.1)
            else:
                pytest.fail("it never worked again")

    asyncio.run(scenario())


def test_who_may_not_join_is_told_and_joins_once_it_is_allowed(server: KafkaServer, url: str) -> None:
    async def scenario() -> None:
        async with opened(url, "q") as broker:
            await broker.publish([message()])
            group = broker.options.names.group("q")
            with denied(server, (ResourceType.GROUP, group, AclOperation.READ)):
                consumer = await broker.consume("q")
                with pytest.raises(BrokerUnavailable, match=r"Group authorization failed.*permissions"):
                    await consumer.receive(1, 4.0)
            taken = []
            while not taken:
                try:
                    taken = await consumer.receive(1, 1.0)
                except BrokerUnavailable:
                    await asyncio.sleep(0.1)
            assert await consumer.settle([(taken[0], Ack())]) == [None]

    asyncio.run(scenario())
