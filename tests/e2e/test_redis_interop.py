"""Other clients of Redis beside ours, in both directions: what anybody can type into redis-cli."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from redis import Redis
from services.base import Server
from tests.conftest import wait_until, working
from tests.servers import private

from postroom import INJECTED, App, Context
from postroom.broker.base import Broker, Subscription, Topic
from postroom.message import Message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=True) as made:
        made.flushall()
        yield made


@pytest.fixture
def app(server: Server, client: Redis) -> Iterator[App]:
    with App(server.url) as made:
        yield made


def redis_cli(server: Server, *command: str) -> str:
    """What the command line client answers."""
    port = server.url.rpartition(":")[2]
    done = subprocess.run(["redis-cli", "-p", port, *command], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def test_a_foreign_message_runs_a_task(server: Server, app: App) -> None:
    """An XADD with a type and data is all it takes; its id is that of the stream, and the job is known by it."""
    seen = []

    @app.task(queue="mail")
    def send(to: str, ctx: Context = INJECTED) -> str:
        seen.append((to, ctx.message.headers))
        return f"sent to {to}"

    with working(app):
        data = json.dumps({"to": "ann"})
        place = redis_cli(
            server, "XADD", "{postroom}:inlet:mail", "*", "type", send.name, "data", data, "source", "/shop"
        )
        job = app.job(f"mail/{place}")
        wait_until(lambda: seen, "the task ran")
        assert job.result(timeout=10) == "sent to ann"
    assert seen == [("ann", {"source": "/shop"})]
    assert redis_cli(server, "XLEN", "{postroom}:inlet:mail") == "0"


def test_a_foreign_event_reaches_every_subscription(client: Redis, app: App) -> None:
    """With an id of its producer's: the same again is no second event."""
    seen = []
    app.topic("order.paid", dict)

    @app.subscribe("order.*", "audit")
    def audit(event: dict[str, int], ctx: Context = INJECTED) -> None:
        seen.append(("audit", event, ctx.message.id, ctx.message.key))

    @app.subscribe("order.paid", "ship")
    def ship(event: dict[str, int], ctx: Context = INJECTED) -> None:
        seen.append(("ship", event, ctx.message.id, ctx.message.key))

    with working(app):
        event = {"type": "order.paid", "data": '{"number": 7}', "id": "order-7", "partitionkey": "ann"}
        for _ in range(2):
            client.xadd("{postroom}:inlet:order.paid", event)
        wait_until(lambda: client.xlen("{postroom}:inlet:order.paid") == 0 and len(seen) >= 2, "both got it")
        wait_until(lambda: all(stats.ready + stats.running == 0 for stats in app.stats()), "nothing is left")
    assert sorted(name for name, *_ in seen) == ["audit", "ship"]
    assert [rest for _, *rest in seen] == [[{"number": 7}, "order-7", "ann"]] * 2


def test_what_a_dead_process_had_taken_is_taken_by_another(client: Redis, app: App) -> None:
    """An entry that somebody read, and did not remove, is claimed from them: nothing of it is lost."""

    @app.task(queue="mail")
    def send(to: str) -> str:
        return to

    app.connect()
    stream = "{postroom}:inlet:mail"
    client.xgroup_create(stream, "postroom", id="0", mkstream=True)
    place = client.xadd(stream, {"type": send.name, "data": '{"to": "ann"}'})
    assert client.xreadgroup("postroom", "dead", {stream: ">"})
    with working(app):
        wait_until(lambda: client.xlen(stream) == 0, "it was taken in", timeout=20)
        assert app.job(f"mail/{place}").result(timeout=10) == "ann"
    assert client.xpending(stream, "postroom")["pending"] == 0


def test_garbage_is_kept_as_a_dead_letter(client: Redis, app: App) -> None:
    """C10: what is no JSON, and what no task is, ends where a person can see it."""

    @app.task(queue="mail")
    def send(to: str) -> str:
        return to

    with working(app):
        client.xadd("{postroom}:inlet:mail", {"type": send.name, "data": b"\xff\x00"})
        (letter,) = wait_until(lambda: app.dead_letters("mail").list(), "it is dead")
    assert (letter.message.body, letter.failures[-1].reason) == (b"\xff\x00", "undecodable")


def test_others_read_what_we_publish(server: Server, client: Redis, app: App) -> None:
    """A job is a hash with plain fields and its JSON body; a retained event an entry of a stream."""
    orders = app.topic("order.paid", dict, retention=3600)

    @app.task(queue="mail")
    def send(to: str) -> str:
        return to

    job = send.using(headers={"region": "eu"}, priority=3).enqueue("ann")
    stored = client.hgetall(f"{{postroom}}:sub:mail:message:{job.id}")
    assert (stored["topic"], stored["type"], stored["priority"], stored["state"]) == ("mail", send.name, "3", "waiting")
    assert (json.loads(stored["data"]), json.loads(stored["headers"])["region"]) == ({"to": "ann"}, "eu")
    event = orders.publish({"number": 7})
    ((_, fields),) = client.xrange("{postroom}:log:order.paid")
    assert (fields["id"], fields["type"], json.loads(fields["data"])) == (event.id, "order.paid", {"number": 7})


def test_names_of_keys_do_not_meet(client: Redis, app: App) -> None:
    """A colon in a name is no end of it: two subscriptions never share a key."""

    async def keys(broker: Broker) -> list[str]:
        names = ["a", "a:message", "a%3Amessage"]
        await broker.declare(
            [Topic(name=name, queue=True) for name in names], [Subscription(name=name, pattern=name) for name in names]
        )
        sent = [Message(id=f"{index}:x", topic=name, name="n", body=b"1") for index, name in enumerate(names)]
        await broker.publish(sent)
        return [stats.name for stats in await broker.stats() if stats.ready == 1]

    app.connect()
    assert app.thread.call(keys) == ["a", "a%3Amessage", "a:message"]
