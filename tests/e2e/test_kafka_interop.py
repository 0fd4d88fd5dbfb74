"""Other clients of Kafka beside ours: its own console programs, and the plain client, in both directions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from services.kafka import KafkaServer
from tests.conftest import wait_until, working
from tests.servers import private

from postroom import INJECTED, App, Context

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with private("kafka", tmp_path_factory.mktemp("kafka")) as made:
        assert isinstance(made, KafkaServer)
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


def test_the_console_producer_runs_a_task(server: KafkaServer, namespace: str) -> None:
    """A JSON object for a body and ``ce_type`` for a task is all it takes; where it lies is its id, each time."""
    seen: list[tuple[str, str, int, dict[str, str]]] = []
    with App(f"{server.url}?namespace={namespace}&partitions=1") as app:

        @app.task(queue="mail")
        def greet(name: str, ctx: Context = INJECTED) -> None:
            seen.append((name, ctx.message.id, ctx.attempt, dict(ctx.message.headers)))
            if ctx.attempt == 1:
                raise ValueError("once more")

        app.connect()
        with working(app, concurrency=2):
            line = 'ce_type:greet,region:eu\t{"name": "ann"}\n'
            server.tool(
                "ConsoleProducer", "--topic", f"{namespace}.mail", "--reader-property", "parse.headers=true", typed=line
            )
            wait_until(lambda: len(seen) == 2, "both attempts", timeout=30)
    assert seen == [("ann", f"{namespace}.mail/0/0", attempt, {"region": "eu"}) for attempt in (1, 2)]


def test_the_console_consumer_reads_ours(server: KafkaServer, namespace: str) -> None:
    """The body is the JSON as it is, and what it is stands in headers with CloudEvents' names."""
    with App(f"{server.url}?namespace={namespace}&partitions=1") as app:

        @app.task(queue="mail")
        def greet(name: str) -> None: ...

        app.connect()
        sent = greet.using(headers={"region": "eu"}, key="ann").enqueue("Ann")
    shown = server.tool(
        "consumer.ConsoleConsumer", "--topic", f"{namespace}.mail", "--from-beginning", "--max-messages", "1",
        "--timeout-ms", "20000", "--formatter-property", "print.headers=true", "--formatter-property", "print.key=true",
    )  # fmt: skip
    headers, key, body = shown.strip().split("\t")
    told = dict(pair.split(":", 1) for pair in headers.split(","))
    assert (json.loads(body), key) == ({"name": "Ann"}, "ann")
    assert (told["ce_id"], told["ce_type"], told["ce_specversion"]) == (sent.id, greet.name, "1.0")
    assert (told["region"], told["content-type"]) == ("eu", "application/json")


def test_an_event_of_the_plain_client_reaches_its_subscriptions(server: KafkaServer, namespace: str) -> None:
    seen: list[tuple[str, dict[str, Any], str]] = []
    with App(f"{server.url}?namespace={namespace}") as app:
        app.topic("orders", dict)

        @app.subscribe("orders", "eu-orders", where={"region": "eu"})
        def note(event: dict[str, Any], ctx: Context = INJECTED) -> None:
            seen.append(("filtered", event, ctx.message.id))

        @app.subscribe("orders", "audit")
        def audit(event: dict[str, Any], ctx: Context = INJECTED) -> None:
            seen.append(("all", event, ctx.message.id))

        app.connect()
        producer = Producer({"bootstrap.servers": server.url.removeprefix("kafka://")})
        for number, region in enumerate(("us", "eu")):
            headers: Any = [("ce_id", f"order-{number}"), ("region", region)]
            producer.produce(f"{namespace}.orders", json.dumps({"region": region}), headers=headers)
        assert producer.flush(10) == 0
        with working(app, concurrency=2):
            wait_until(lambda: len(seen) == 3, "the events", timeout=30)
    us, eu = ({"region": region} for region in ("us", "eu"))
    assert sorted(seen, key=str) == [("all", eu, "order-1"), ("all", us, "order-0"), ("filtered", eu, "order-1")]


def test_undecodable_bytes_of_another_client_are_dead_letters(server: KafkaServer, namespace: str) -> None:
    """C10: never dropped, and shown as they came."""
    with App(f"{server.url}?namespace={namespace}") as app:

        @app.task(queue="mail")
        def greet(name: str) -> None: ...

        app.connect()
        producer = Producer({"bootstrap.servers": server.url.removeprefix("kafka://")})
        producer.produce(f"{namespace}.mail", b"\xff\xfe", headers=[("ce_type", "greet"), ("ce_id", "bad")])
        assert producer.flush(10) == 0
        with working(app, concurrency=2):
            wait_until(lambda: app.dead_letters("mail").list(), "the dead letter", timeout=30)
        (letter,) = app.dead_letters("mail").list()
    assert (letter.message.id, letter.message.body, letter.failures[-1].reason) == ("bad", b"\xff\xfe", "undecodable")


def test_dead_letters_are_readable_by_the_plain_client(server: KafkaServer, namespace: str) -> None:
    with App(f"{server.url}?namespace={namespace}") as app:

        @app.task(queue="mail")
        def greet(name: str) -> None:
            from postroom import Reject

            raise Reject("nobody of that name")

        sent = greet.enqueue("ann")
        with working(app, concurrency=2):
            wait_until(lambda: app.dead_letters("mail").list(), "the dead letter", timeout=30)
    consumer = Consumer({"bootstrap.servers": server.url.removeprefix("kafka://"), "group.id": "somebody"})
    consumer.assign([TopicPartition(f"{namespace}-dead.mail", 0, 0)])
    deadline = time.monotonic() + 20
    record = None
    while record is None:
        assert time.monotonic() < deadline, "the dead letter cannot be read"
        record = consumer.poll(1.0)
    consumer.close()
    headers: dict[str, bytes] = dict(record.headers() or [])  # type: ignore[arg-type]
    assert (record.key().partition(b"\n")[0], record.value()) == (sent.id.encode(), b'{"name":"ann"}')
    assert json.loads(headers["postroom-failures"])[0]["message"] == "nobody of that name"
