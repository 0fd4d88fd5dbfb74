"""Events over HTTP: plain, and as CloudEvents 1.0 in all three modes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from postroom import App
from postroom.broker.base import Broker, Delivery

Client = httpx.AsyncClient
STRUCTURED = {"Content-Type": "application/cloudevents+json; charset=UTF-8"}
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
BATCHED = {"Content-Type": "application/cloudevents-batch+json"}


def talk(app: App, conversation: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    """Run a conversation with the gateway in this process."""

    async def main() -> Any:
        transport = httpx.ASGITransport(app.asgi(**options))
        async with Client(transport=transport, base_url="http://localhost") as client:
            return await conversation(client)

    return asyncio.run(main())


def delivered(app: App, queue: str, count: int = 10) -> list[Delivery]:
    async def take(broker: Broker) -> list[Delivery]:
        consumer = await broker.consume(queue)
        try:
            return await consumer.receive(count, 0.0)
        finally:
            await consumer.close()

    return app.thread.call(take)


@dataclass
class Signup:
    user: str


@pytest.fixture
def app(url: str) -> Iterator[App]:
    with App(url) as made:

        @made.topic("user.signup", Signup).subscribe("mail")
        def mail(event: Signup) -> None: ...

        made.topic("user.left", Signup)

        @made.task(queue="sums")
        def add(a: int, b: int = 1) -> int:
            return a + b

        yield made


def event(**attributes: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": "1",
        "source": "/shop",
        "type": "user.signup",
        "data": {"user": "ada"},
        **attributes,
    }


def binary(**attributes: str) -> dict[str, str]:
    plain = {name: str(value) for name, value in event(**attributes).items() if name != "data"}
    return {f"ce-{name}": value for name, value in plain.items()}


def test_a_plain_event(app: App) -> None:
    answer = talk(app, lambda c: c.post("/v1/topics/user.signup?key=ada", json={"user": "ada"}))
    assert answer.status_code == 202
    assert answer.json()["topic"] == "user.signup"
    (delivery,) = delivered(app, "mail")
    message = delivery.message
    assert (message.id, message.name, message.key) == (answer.json()["id"], "user.signup", "ada")


def test_structured(app: App) -> None:
    sent = event(
        subject="a b", time="2030-01-01T00:00:00Z", partitionkey="p", expirytime="2999-01-01T00:00:00Z", sequence=7
    )
    answer = talk(app, lambda c: c.post("/v1/events", content=json.dumps(sent), headers=STRUCTURED))
    assert answer.status_code == 202
    (delivery,) = delivered(app, "mail")
    message = delivery.message
    assert message.body == b'{"user": "ada"}', "the data are the bytes that were sent"
    assert (message.name, message.topic, message.key) == ("user.signup", "user.signup", "p")
    assert message.expires_at == pytest.approx(32472144000.0)
    assert dict(message.headers) == {
        "ce-id": "1",
        "ce-source": "/shop",
        "ce-type": "user.signup",
        "ce-subject": "a b",
        "ce-time": "2030-01-01T00:00:00Z",
        "sequence": "7",
    }


def test_binary(app: App) -> None:
    headers = binary(subject="caf%C3%A9%20au%20lait")
    answer = talk(app, lambda c: c.post("/v1/topics/user.signup", json={"user": "ada"}, headers=headers))
    assert answer.status_code == 202
    (delivery,) = delivered(app, "mail")
    assert delivery.message.headers["ce-subject"] == "café au lait"


def test_source_and_id_are_the_identity_in_every_mode(app: App) -> None:
    async def conversation(client: Client) -> list[str]:
        answers = [
            await client.post("/v1/events", content=json.dumps(event()), headers=STRUCTURED),
            await client.post(
                "/v1/topics/user.signup",
                content=b'{"user": "ada"}',
                headers=binary() | {"Content-Type": "application/json"},
            ),
            await client.post("/v1/events", content=json.dumps(event(source="/other")), headers=STRUCTURED),
        ]
        batch = await client.post("/v1/events", content=json.dumps([event()]), headers=BATCHED)
        return [answer.json()["id"] for answer in answers] + [batch.json()["results"][0]["id"]]

    first, second, other, third = talk(app, conversation)
    assert first == second == third
    assert other != first
    assert len(delivered(app, "mail")) == 2


def test_a_batch_is_answered_item_by_item(app: App) -> None:
    items = [event(), event(id="2", data={"user": 1}), event(id="3", type="user.sign"), event(id="4", type="user.left")]
    answer = talk(app, lambda c: c.post("/v1/events", content=json.dumps(items), headers=BATCHED))
    assert answer.status_code == 207
    results = answer.json()["results"]
    assert [item["status"] for item in results] == [202, 422, 404, 202]
    assert "did you mean" in results[2]["problem"]["detail"]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"specversion": "0.3"}, 400, "specversion"),
        ({"id": ""}, 400, "'id'"),
        ({"id": None}, 400, "'id'"),
        ({"source": "a b"}, 400, "source"),
        ({"time": "yesterday"}, 400, "time"),
        ({"expirytime": "2030"}, 400, "expirytime"),
        ({"Upper": "x"}, 400, "Upper"),
        ({"extra": {"a": 1}}, 400, "extra"),
        ({"datacontenttype": "text/plain"}, 400, "datacontenttype"),
        ({"data_base64": "AAAA"}, 422, "data_base64"),
        ({"data": {"user": 1}}, 422, "Expected `str`"),
        ({"type": "user.sign"}, 404, "did you mean"),
        ({"source": "x" * 1025}, 400, "source"),
    ],
)
def test_bad_cloudevents(app: App, changes: dict[str, Any], status: int, words: str) -> None:
    answer = talk(app, lambda c: c.post("/v1/events", content=json.dumps(event(**changes)), headers=STRUCTURED))
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert delivered(app, "mail") == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"ce-specversion": "1.0", "ce-id": "1"}, 400),
        (binary() | {"ce-subject": "%FF"}, 400),
        (binary() | {"ce-datacontenttype": "application/json"}, 400),
        (binary() | {"Content-Type": "text/plain"}, 415),
        (binary() | {"Idempotency-Key": "k"}, 400),
    ],
)
def test_bad_binary_cloudevents(app: App, headers: dict[str, str], status: int) -> None:
    headers = {"Content-Type": "application/json", **headers}
    answer = talk(app, lambda c: c.post("/v1/topics/user.signup", content=b'{"user": "ada"}', headers=headers))
    assert answer.status_code == status, answer.text
    assert delivered(app, "mail") == []


def test_not_an_event(app: App) -> None:
    async def conversation(client: Client) -> list[int]:
        answers = [
            await client.post("/v1/events", json={"user": "ada"}),
            await client.post("/v1/topics/user.signup", content=b"x", headers={"Content-Type": "text/plain"}),
            await client.post("/v1/topics/user.sign", json={"user": "ada"}),
            await client.post("/v1/topics/user.signup", json={"user": 1}),
            await client.post("/v1/events", content=b"{", headers=STRUCTURED),
            await client.post("/v1/events", content=b"[]", headers=STRUCTURED),
        ]
        return [answer.status_code for answer in answers]

    assert talk(app, conversation) == [415, 415, 404, 422, 400, 422]


def test_where_chooses_alike_however_an_event_came(app: App) -> None:
    """An extension is a header of the message under its own name, as a Python producer gives it."""
    signups = app.topics["user.signup"]

    @signups.subscribe("vips", where={"tier": "gold"})
    def vips(event: Signup) -> None: ...

    async def conversation(client: Client) -> list[int]:
        plain = [
            await client.post(
                "/v1/topics/user.signup", json={"user": tier}, headers={"ce-tier": tier, "x-other": "x", **TRACE}
            )
            for tier in ("gold", "tin")
        ]
        events = [event(id=tier, tier=tier, data={"user": f"event {tier}"}) for tier in ("gold", "tin")]
        batch = await client.post("/v1/events", content=json.dumps(events), headers=BATCHED)
        return [answer.status_code for answer in (*plain, batch)]

    assert talk(app, conversation) == [202, 202, 202]
    signups.using(headers={"tier": "gold"}).publish(Signup("python"))
    got = {delivery.message.body: dict(delivery.message.headers) for delivery in delivered(app, "vips")}
    assert list(got) == [b'{"user":"gold"}', b'{"user": "event gold"}', b'{"user":"python"}']
    assert got[b'{"user":"gold"}'] == {"tier": "gold", **TRACE}
    assert got[b'{"user": "event gold"}']["tier"] == "gold"


@pytest.mark.parametrize("path", ["/v1/topics/user.signup", "/v1/tasks/add", "/v1/tasks/add/batch"])
@pytest.mark.parametrize("name", ["id", "source", "type", "partitionkey", "expirytime", "two-words"])
def test_what_only_a_cloudevent_has_is_not_ignored(app: App, path: str, name: str) -> None:
    answer = talk(app, lambda c: c.post(path, json={"user": "ada"}, headers={f"ce-{name}": "1"}))
    assert (answer.status_code, answer.json()["errors"][0]["attribute"]) == (400, name)
    assert delivered(app, "mail") == delivered(app, "sums") == []


def test_a_batch_that_is_sent_again_finds_its_jobs(app: App) -> None:
    async def conversation(client: Client) -> list[Any]:
        key = {"Idempotency-Key": '"night-1"'}
        answers = [
            await client.post("/v1/tasks/add/batch", json=items, headers=key)
            for items in ([{"a": 1}, {"a": 1}], [{"a": 1}, {"a": 1}], [{"a": 1}, {"a": 2}])
        ]
        return [answer.json()["results"] for answer in answers]

    first, again, other = talk(app, conversation)
    assert first == again
    assert len({item["id"] for item in first}) == 2
    assert [item["status"] for item in other] == [202, 422]
    assert len(delivered(app, "sums")) == 2


def test_a_batch_of_calls_is_answered_item_by_item(app: App) -> None:
    async def conversation(client: Client) -> list[Any]:
        path = "/v1/tasks/add/batch"
        return [
            await client.post(f"{path}?priority=7", json=[{"a": 1}, {"a": "x"}, {"a": 2}, [1]]),
            await client.post(path, json=[{"a": 3}]),
            await client.post(path, json=[{"b": 1}, {"a": None}]),
            await client.post(path, json=[]),
            await client.post(path, json={"a": 1}),
            await client.post(path, json=[{"a": 1}] * 11),
        ]

    mixed, fine, bad, empty, object_, long = talk(app, conversation, max_batch=10)
    assert mixed.status_code == 207
    assert [item["status"] for item in mixed.json()["results"]] == [202, 422, 202, 422]
    assert fine.status_code == 202
    assert (bad.status_code, [item["status"] for item in bad.json()["results"]]) == (422, [422, 422])
    assert [answer.status_code for answer in (empty, object_, long)] == [422, 422, 413]
    got = {delivery.message.body: delivery.message.priority for delivery in delivered(app, "sums")}
    assert got == {b'{"a":1}': 7, b'{"a":2}': 7, b'{"a":3}': 0}
