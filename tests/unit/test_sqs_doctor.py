"""Misconfigured queues and topics are found, each by name, and with a remedy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from aiobotocore.session import AioSession
from services.sqs import CREDENTIALS, SQSServer

from postroom.broker.base import Subscription, Topic
from postroom.broker.sqs import SQSBroker
from postroom.broker.sqs.service import Service
from postroom.doctor import Finding
from postroom.errors import ConfigurationError
from tests.servers import private


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQSServer]:
    with pytest.MonkeyPatch.context() as patch, private("sqs", tmp_path_factory.mktemp("sqs")) as made:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        assert isinstance(made, SQSServer)
        yield made


class Account:
    """The services as an operator sees them."""

    def __init__(self, sqs: Any, sns: Any, namespace: str) -> None:
        self.sqs = sqs
        self.sns = sns
        self._namespace = namespace

    async def url(self, name: str) -> str:
        return str((await self.sqs.get_queue_url(QueueName=f"{self._namespace}-{name}"))["QueueUrl"])

    async def set(self, name: str, **attributes: str) -> None:
        await self.sqs.set_queue_attributes(QueueUrl=await self.url(name), Attributes=attributes)

    async def link(self) -> str:
        (found,) = (await self.sns.list_subscriptions())["Subscriptions"][-1:]
        return str(found["SubscriptionArn"])


@asynccontextmanager
async def account(server: SQSServer, namespace: str) -> AsyncIterator[Account]:
    session, options = AioSession(), {"region_name": "eu-west-1", "endpoint_url": server.endpoint_url}
    async with session.create_client("sqs", **options) as sqs, session.create_client("sns", **options) as sns:
        yield Account(sqs, sns, namespace)


def findings(server: SQSServer, plant: Callable[[Account], Awaitable[object]] | None) -> list[Finding]:
    async def run() -> list[Finding]:
        namespace = f"t{uuid4().hex[:12]}"
        broker = SQSBroker(f"{server.url}&namespace={namespace}")
        await broker.connect()
        try:
            await broker.declare(
                [Topic(name="mail", queue=True), Topic(name="orders")],
                [
                    Subscription(name="mail", pattern="mail"),
                    Subscription(name="audit", pattern="orders", where={"region": "eu"}),
                ],
            )
            if plant is not None:
                async with account(server, namespace) as seen:
                    await plant(seen)
            return await broker.examine()
        finally:
            await broker.close()

    return asyncio.run(run())


async def _unlink(seen: Account) -> None:
    await seen.sns.unsubscribe(SubscriptionArn=await seen.link())


async def _change_link(seen: Account, name: str, value: str) -> None:
    await seen.sns.set_subscription_attributes(
        SubscriptionArn=await seen.link(), AttributeName=name, AttributeValue=value
    )


async def _delete(seen: Account, name: str) -> None:
    await seen.sqs.delete_queue(QueueUrl=await seen.url(name))


async def _lead_astray(seen: Account) -> None:
    arn = (await seen.sqs.get_queue_attributes(QueueUrl=await seen.url("audit--dead"), AttributeNames=["QueueArn"]))[
        "Attributes"
    ]["QueueArn"]
    await seen.set("mail", RedrivePolicy=json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": "3"}))


PLANTED: dict[str, tuple[Callable[[Account], Awaitable[object]], str, str]] = {
    "short retention": (lambda seen: seen.set("mail", MessageRetentionPeriod="345600"), "warning", "for 4 days"),
    "short retention of the dead": (lambda seen: seen.set("mail--dead", MessageRetentionPeriod="3600"), "warning",
                                    "mail--dead keeps"),
    "small messages": (lambda seen: seen.set("mail", MaximumMessageSize="65536"), "error", "65,536 bytes"),
    "no backstop": (lambda seen: seen.set("mail", RedrivePolicy=""), "warning", "no redrive policy"),
    "a wrong and early backstop": (_lead_astray, "error", "after 3 receives"),
    "no dead letters": (lambda seen: _delete(seen, "mail--dead"), "error", "is missing"),
    "a foreign key": (lambda seen: seen.set("audit", KmsMasterKeyId="alias/aws/sqs"), "warning", "alias/aws/sqs"),
    "no policy": (lambda seen: seen.set("audit", Policy=""), "error", "lets no SNS topic send"),
    "no link": (_unlink, "error", "gets nothing of topic orders"),
    "envelopes": (lambda seen: _change_link(seen, "RawMessageDelivery", "false"), "error", "raw delivery is off"),
    "another filter": (lambda seen: _change_link(seen, "FilterPolicy", '{"region": ["us"]}'), "error",
                       "the filter policy is another"),
}  # fmt: skip


def test_sound_queues_have_no_errors(server: SQSServer) -> None:
    found = findings(server, None)
    assert {item.title: item.level for item in found} == {
        "queue audit": "ok",
        "queue mail": "ok",
        "subscription audit": "ok",
        "retention": "warning",
    }


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_misconfiguration_is_found(server: SQSServer, name: str) -> None:
    plant, level, words = PLANTED[name]
    found = [item for item in findings(server, plant) if words in item.detail]
    assert [item.level for item in found] == [level]
    assert found[0].remedy


def test_what_must_not_be_looked_at_hides_nothing_else(server: SQSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Service.call

    async def deny(self: Service, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        if operation == "get_subscription_attributes":
            raise ConfigurationError("AccessDenied")
        return await call(self, service, operation, **parameters)

    async def after_declaring(_: Account) -> None:
        monkeypatch.setattr(Service, "call", deny)

    found = {item.title: item for item in findings(server, after_declaring)}
    assert found["subscription audit"].level == "warning"
    assert "sns:GetSubscriptionAttributes" in found["subscription audit"].remedy
    assert {"queue audit", "queue mail", "retention"} <= found.keys()
