"""Other clients of SQS and SNS beside ours: boto's calls as anybody makes them, in both directions."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiobotocore.session import AioSession
from services.sqs import CREDENTIALS, ElasticMQServer, MotoServer, SQSServer
from tests.conftest import wait_until, working
from tests.servers import private, started

from postroom import INJECTED, App, Context, RetryPolicy
from postroom.broker.base import Consumer, Dead, Delivery, Retry, Subscription, Topic
from postroom.broker.sqs import SQSBroker, letters
from postroom.message import Failure, Message, new_id

OPTIONS = {"region_name": "eu-west-1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQSServer]:
    with pytest.MonkeyPatch.context() as patch, private("sqs", tmp_path_factory.mktemp("sqs")) as made:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        assert isinstance(made, SQSServer)
        yield made


@pytest.fixture
def url(server: SQSServer) -> str:
    return f"{server.url}&namespace=t{uuid4().hex[:12]}"


def foreign(url: str, service: str, use: Callable[[Any], Awaitable[Any]]) -> Any:
    """One use of a plain client."""
    endpoint = url.partition("endpoint_url=")[2].partition("&")[0]

    async def run() -> Any:
        async with AioSession().create_client(service, endpoint_url=endpoint, **OPTIONS) as client:
            return await use(client)

    return asyncio.run(run())


def place(url: str, name: str) -> str:
    return f"{url.partition('namespace=')[2]}-{name}"


def text(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def test_a_message_of_another_client_runs_a_task(url: str) -> None:
    """A JSON object for a body and ``ce-type`` for a task is all it takes; without an id SQS's own stands in."""
    seen: list[tuple[str, str, int, dict[str, str]]] = []
    with App(url) as app:

        @app.task(queue="mail")
        def greet(name: str, ctx: Context = INJECTED) -> None:
            seen.append((name, ctx.message.id, ctx.attempt, dict(ctx.message.headers)))
            if ctx.attempt == 1:
                raise ValueError("once more")

        app.connect()

        async def send(sqs: Any) -> str:
            queue = (await sqs.get_queue_url(QueueName=place(url, "mail")))["QueueUrl"]
            attributes = {"ce-type": text("greet"), "region": text("eu")}
            sent = await sqs.send_message(QueueUrl=queue, MessageBody='{"name": "ann"}', MessageAttributes=attributes)
            return str(sent["MessageId"])

        with working(app, concurrency=2):
            identity = foreign(url, "sqs", send)
            wait_until(lambda: len(seen) == 2, "both attempts", timeout=20)
    assert [item[:3] for item in seen] == [("ann", identity, 1), ("ann", identity, 2)]
    assert seen[0][3] == {"region": "eu"}


def test_a_message_of_another_client_to_a_topic_reaches_its_subscriptions(url: str) -> None:
    """By SNS, through the filter."""
    seen: list[tuple[dict[str, Any], str]] = []
    with App(url) as app:
        app.topic("orders", dict)

        @app.subscribe("orders", "eu-orders", where={"region": "eu"})
        def note(event: dict[str, Any], ctx: Context = INJECTED) -> None:
            seen.append((event, ctx.message.id))

        app.connect()

        async def publish(sns: Any) -> None:
            (topic,) = [
                found["TopicArn"]
                for found in (await sns.list_topics())["Topics"]
                if found["TopicArn"].endswith(place(url, "orders"))
            ]
            for number, region in enumerate(("us", "eu")):
                attributes = {"region": text(region), "ce-id": text(f"order-{number}")}
                await sns.publish(TopicArn=topic, Message=json.dumps({"region": region}), MessageAttributes=attributes)

        with working(app, concurrency=2):
            foreign(url, "sns", publish)
            wait_until(lambda: seen, "the event", timeout=20)
    assert seen == [({"region": "eu"}, "order-1")]


@pytest.mark.parametrize("kind", ["queue", "topic"])
def test_another_client_reads_ours(url: str, kind: str) -> None:
    """The body is the JSON as it is, and what it is stands in attributes with CloudEvents' names."""
    with App(url) as app:

        @app.task(queue="mail")
        def greet(name: str) -> None: ...

        orders = app.topic("orders", dict)

        @app.subscribe("orders", "audit")
        def audit(event: dict[str, Any]) -> None: ...

        app.connect()
        if kind == "queue":
            sent = greet.using(headers={"region": "eu"}).enqueue("Grüße").id
        else:
            sent = orders.using(headers={"region": "eu"}).publish({"name": "Grüße"}).id
        where = "mail" if kind == "queue" else "audit"

        async def receive(sqs: Any) -> dict[str, Any]:
            queue = (await sqs.get_queue_url(QueueName=place(url, where)))["QueueUrl"]
            answer = await sqs.receive_message(QueueUrl=queue, MessageAttributeNames=["All"], WaitTimeSeconds=5)
            return dict(answer["Messages"][0])

        raw = foreign(url, "sqs", receive)
    assert json.loads(raw["Body"]) == {"name": "Grüße"}
    values = {name: value["StringValue"] for name, value in raw["MessageAttributes"].items()}
    assert values["ce-id"] == sent
    assert values["ce-source"] == ("mail" if kind == "queue" else "orders")
    assert values["ce-specversion"] == "1.0"
    assert values["region"] == "eu"


def test_old_dead_letters_are_stored_anew(url: str) -> None:
    """C8: nothing of them changes, but the service counts their days from the beginning."""

    async def run() -> None:
        broker = SQSBroker(url)
        await broker.connect()
        await broker.declare([Topic(name="mail", queue=True)], [Subscription(name="mail", pattern="mail")])
        consumer = await broker.consume("mail")
        for _ in range(3):
            await broker.publish([Message(id=new_id(), topic="mail", name="work", body=b"{}")])
        taken = await _take(consumer, 3)
        await consumer.settle([(delivery, Dead(Failure(attempt=1, reason="rejected"))) for delivery in taken])
        before = await broker.dead_letters("mail")
        service, topology = broker._opened()
        kept = await topology.find("mail")
        assert await letters.renew(service, kept, 60.0, time.time()) == 0
        assert await letters.renew(service, kept, 0.0, time.time()) == 3
        assert await broker.dead_letters("mail") == before
        await broker.close()

    asyncio.run(run())


async def _take(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await consumer.receive(count - len(taken), 5.0)
    return taken


def test_a_second_emulator_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto: a topic with a filter, order by key, a retry, a dead letter, a redrive."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = MotoServer(tmp_path / "moto")
    server.start()

    async def run() -> None:
        broker = SQSBroker(server.url)
        await broker.connect()
        await broker.declare(
            [Topic(name="orders"), Topic(name="keyed", queue=True)],
            [
                Subscription(name="audit", pattern="orders", where={"region": "eu"}),
                Subscription(name="keyed", pattern="keyed", ordered=True),
            ],
        )
        sent = [
            Message(id=new_id(), topic="orders", name="paid", body=b"{}", headers={"region": region})
            for region in ("us", "eu")
        ]
        keyed = [Message(id=new_id(), topic="keyed", name="work", body=b"%d" % n, key="k") for n in range(2)]
        assert await broker.publish([*sent, *keyed]) == [message.id for message in (*sent, *keyed)]
        audit = await broker.consume("audit")
        (delivery,) = await _take(audit, 1)
        assert delivery.message == sent[1]
        failure = Failure(attempt=1, reason="error")
        assert await audit.settle([(delivery, Retry(delay=0.0, failure=failure))]) == [None]
        (delivery,) = await _take(audit, 1)
        assert delivery.attempt == 2
        assert await audit.settle([(delivery, Dead(failure))]) == [None]
        assert await broker.redrive("audit", [sent[1].id]) == [sent[1].id]
        (delivery,) = await _take(audit, 1)
        assert (delivery.message, delivery.attempt) == (sent[1], 1)
        ordered = await broker.consume("keyed")
        (first,) = await _take(ordered, 1)
        assert await ordered.receive(1, 0.5) == []
        assert await ordered.settle([(first, Retry(delay=0.0, failure=failure))]) == [None]
        (again,) = await _take(ordered, 1)
        assert (again.message, again.attempt) == (keyed[0], 2)
        await broker.close()

    try:
        asyncio.run(run())
    finally:
        server.stop()


@pytest.mark.parametrize("ordered", [False, True], ids=["standard", "fifo"])
def test_amazons_own_redrive_begins_at_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """It moves letters as they are, whatever we would change: the worker knows what they have been."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    attempts: list[int] = []

    async def move(sqs: Any) -> None:
        name = "postroom-mail--dead"
        if not ordered:
            queue = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
            told = await sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])
            await sqs.start_message_move_task(SourceArn=told["Attributes"]["QueueArn"])
            return
        # ElasticMQ's task leaves FIFO queues alone. Amazon's takes the message's own id to tell it apart.
        queue = (await sqs.get_queue_url(QueueName=f"{name}.fifo"))["QueueUrl"]
        (letter,) = (await sqs.receive_message(QueueUrl=queue, MessageAttributeNames=["All"]))["Messages"]
        await sqs.send_message(
            QueueUrl=queue.replace("--dead", ""),
            MessageBody=letter["Body"],
            MessageAttributes=letter["MessageAttributes"],
            MessageGroupId="any",
            MessageDeduplicationId=letter["MessageId"],
        )
        await sqs.delete_message(QueueUrl=queue, ReceiptHandle=letter["ReceiptHandle"])

    with (
        started(ElasticMQServer(tmp_path / "elasticmq")) as server,
        App(server.url, store=f"sqlite:///{tmp_path}/jobs.db") as app,
    ):

        @app.task(queue="mail", ordered=ordered, retry=RetryPolicy(max_attempts=2, backoff=lambda _: 0.0))
        def send(ctx: Context = INJECTED) -> None:
            attempts.append(ctx.attempt)
            if len(attempts) <= 4:
                raise ValueError("no")

        job = send.enqueue()
        letters = app.dead_letters("mail")
        with working(app, concurrency=1):
            wait_until(letters.list, "the first death", timeout=20)
            foreign(server.url, "sqs", move)
            wait_until(lambda: len(attempts) == 4 and letters.list(), "the second death", timeout=20)
            (letter,) = letters.list()
            assert (letter.redriven, len(letter.failures)) == (1, 4)
            foreign(server.url, "sqs", move)
            # Until it runs, it is dead.
            wait_until(lambda: len(attempts) == 5, "the last attempt", timeout=20)
            job.result(timeout=20)
    assert attempts == [1, 2, 1, 2, 1]


def test_a_script_that_just_ends_leaves_in_silence(url: str, tmp_path: Path) -> None:
    """Nobody closes an app at the end of a script, and the client's library tells of each connection that is open."""
    (tmp_path / "shop.py").write_text(
        "from postroom import App\n"
        f"app = App({url!r}, store='sqlite:///jobs.db')\n"
        "@app.task(queue='mail')\n"
        "def greet(name: str) -> None: ...\n"
        "if __name__ == '__main__':\n"
        "    greet.enqueue('Ada')\n"
    )
    command = [sys.executable, "shop.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
