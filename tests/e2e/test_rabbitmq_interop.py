"""pika beside us, in both directions: what any client of RabbitMQ can send and read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from services.base import Server
from tests.conftest import wait_until, working
from tests.servers import private

from postroom import INJECTED, App, Context, RetryPolicy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as made:
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:8]}"


@pytest.fixture
def app(server: Server, namespace: str) -> Iterator[App]:
    with App(f"{server.url}?namespace={namespace}") as made:
        yield made


@pytest.fixture
def channel(server: Server) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        made = connection.channel()
        made.confirm_delivery()
        yield made


def test_a_foreign_message_runs_a_task(app: App, channel: BlockingChannel, namespace: str) -> None:
    """A type and a body is all it takes. An id is given to what has none, and stays through a retry."""
    seen = []

    @app.task(queue="mail")
    def send(to: str, ctx: Context = INJECTED) -> None:
        seen.append((to, ctx.message.id, dict(ctx.message.headers), ctx.attempt))
        if ctx.attempt == 1:
            raise ValueError("once")

    app.connect()
    with working(app):
        properties = pika.BasicProperties(type=send.name, headers={"region": "eu", "n": 7}, delivery_mode=2)
        channel.basic_publish("", f"{namespace}.mail", b'{"to": "ann"}', properties, mandatory=True)
        wait_until(lambda: len(seen) == 2, "it ran twice")
    (first, second) = seen
    assert first[:3] == second[:3] == ("ann", first[1], {"region": "eu", "n": "7"})
    assert len(first[1]) == 36


def test_a_foreign_event_reaches_every_subscription(app: App, channel: BlockingChannel, namespace: str) -> None:
    """CloudEvents headers, as the AMQP binding of CloudEvents 1.0 names them; filtered by the server."""
    seen = []
    app.topic("order.paid", dict)

    @app.subscribe("order.*", "audit")
    def audit(event: dict[str, int], ctx: Context = INJECTED) -> None:
        seen.append(("audit", event, ctx.message.id, ctx.message.key, ctx.message.topic))

    @app.subscribe("order.paid", "europe", where={"region": "eu"})
    def europe(event: dict[str, int], ctx: Context = INJECTED) -> None:
        seen.append(("europe", event, ctx.message.id, ctx.message.key, ctx.message.topic))

    app.connect()
    with working(app):
        for region in ("eu", "us"):
            headers = {
                "cloudEvents:specversion": "1.0",
                "cloudEvents:id": f"order-7-{region}",
                "cloudEvents:source": "/shop",
                "cloudEvents:type": "order.paid",
                "cloudEvents:partitionkey": "ann",
                "region": region,
            }
            properties = pika.BasicProperties(headers=headers)
            channel.basic_publish(f"{namespace}:events", "order.paid", b'{"number": 7}', properties)
        wait_until(lambda: len(seen) >= 3, "both got theirs")
    assert sorted(seen) == [
        ("audit", {"number": 7}, "order-7-eu", "ann", "order.paid"),
        ("audit", {"number": 7}, "order-7-us", "ann", "order.paid"),
        ("europe", {"number": 7}, "order-7-eu", "ann", "order.paid"),
    ]


def test_garbage_is_kept_as_a_dead_letter(app: App, channel: BlockingChannel, namespace: str) -> None:
    """C10: what is no JSON ends where a person can see it, and can be redriven and discarded."""

    @app.task(queue="mail")
    def send(to: str) -> None: ...

    app.connect()
    with working(app):
        properties = pika.BasicProperties(type=send.name, message_id="garbage")
        channel.basic_publish("", f"{namespace}.mail", b"\xff\x00", properties)
        (letter,) = wait_until(lambda: app.dead_letters("mail").list(), "it is dead")
    assert (letter.message.id, letter.message.body) == ("garbage", b"\xff\x00")
    assert letter.failures[-1].reason == "undecodable"


def test_others_read_what_we_publish(app: App, channel: BlockingChannel, namespace: str) -> None:
    """A job in its queue, an event in a queue that somebody else has bound to ours."""
    orders = app.topic("order.paid", dict)

    @app.task(queue="mail")
    def send(to: str) -> None: ...

    app.connect()
    theirs = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(theirs, f"{namespace}:events", "order.#")
    job = send.using(headers={"region": "eu"}).enqueue("ann")
    event = orders.publish({"number": 7})
    method, properties, body = channel.basic_get(f"{namespace}.mail", auto_ack=True)
    assert method is not None
    assert json.loads(body) == {"to": "ann"}
    assert (properties.message_id, properties.type, properties.content_type) == (job.id, send.name, "application/json")
    assert (properties.headers["region"], properties.headers["cloudEvents_id"]) == ("eu", job.id)
    assert abs(properties.timestamp - time.time()) < 60
    _, properties, body = wait_until(lambda: _get(channel, theirs), "the event is there")
    assert json.loads(body) == {"number": 7}
    told = {name: properties.headers[f"cloudEvents_{name}"] for name in ("specversion", "id", "source", "type")}
    assert told == {"specversion": "1.0", "id": event.id, "source": "order.paid", "type": "order.paid"}


def _get(channel: BlockingChannel, queue: str) -> tuple[object, pika.BasicProperties, bytes] | None:
    found = channel.basic_get(queue, auto_ack=True)
    return None if found[0] is None else found


_LATIN = "Zürich".encode("latin-1")


@pytest.mark.parametrize(
    "properties",
    [
        {"message_id": _LATIN},
        {"message_id": _LATIN, "reply_to": "x"},
        {"message_id": _LATIN, "headers": {_LATIN: 1, "text": _LATIN}},
        {"headers": {"cloudEvents_id": _LATIN, "cloudEvents_source": _LATIN}},
        {"headers": {"large": "x" * 110_000}},
        {"headers": {"postroom": "{", "postroom-failures": "x", "x-delivery-count": "many"}},
        {"timestamp": 1_795_536_000_000, "headers": {"at": datetime(9000, 1, 1, tzinfo=UTC)}},
    ],
    ids=["id", "by pika", "headers", "attributes", "large", "ours", "times"],
)
def test_foreign_properties_harm_nobody(
    app: App, channel: BlockingChannel, namespace: str, properties: dict[str, object]
) -> None:
    """C10: text in another encoding, or more than we can store again: neighbours run, and it becomes a dead letter."""

    @app.task(queue="mail", retry=RetryPolicy(max_attempts=1))
    def send(to: str) -> None:
        if to == "nobody":
            raise ValueError(to)

    app.connect()
    with working(app):
        for kind in (send.name, _LATIN):
            foreign = pika.BasicProperties(**{"type": kind, **properties})
            channel.basic_publish("", f"{namespace}.mail", b'{"to": "nobody"}', foreign)
            job = send.enqueue("ann")
        wait_until(lambda: app.stats()[0].ready == 0, f"{job.id} ran")
        # What is too large is dead at once, whatever it is called.
        count = 2 if "large" in str(properties) else 1
        letters = wait_until(lambda: len(found := app.dead_letters("mail").list()) == count and found, "it is dead")
        assert {letter.message.body for letter in letters} == {b'{"to": "nobody"}'}
        reason = "undecodable" if count == 2 else "error"
        assert [letter.failures[-1].reason for letter in letters] == [reason] * count
        ids = {letter.message.id for letter in letters}
        assert app.dead_letters("mail").discard(sorted(ids)) == len(ids)


def test_letters_that_look_alike_are_not_one(app: App, channel: BlockingChannel, namespace: str) -> None:
    """C8: other clients may give one id to many messages, or none to any. Discarding one keeps the other."""

    @app.task(queue="mail", retry=RetryPolicy(max_attempts=1))
    def send(to: str) -> None:
        raise ValueError(to)

    box = app.dead_letters("mail")
    app.connect()
    with working(app):
        for to in ("ann", "bob"):
            channel.basic_publish(
                "",
                f"{namespace}.mail",
                f'{{"to": "{to}"}}'.encode(),
                pika.BasicProperties(type=send.name, message_id="1"),
            )
        for _ in range(2):
            large = pika.BasicProperties(type=send.name, headers={"large": "x" * 110_000})
            channel.basic_publish("", f"{namespace}.mail", b"{}", large)
        letters = wait_until(lambda: len(found := box.list()) == 4 and found, "all are dead", 30.0)
    for left in range(3, -1, -1):
        assert box.discard([letters[0].message.id]) == 1
        letters = box.list()
        assert len(letters) == left
