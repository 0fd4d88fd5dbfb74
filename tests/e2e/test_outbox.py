"""Messages enqueued in transactions of any database reach any broker: all that were committed, nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from tests.conftest import wait_until, working

from postroom import (
    App,
    BrokerUnavailable,
    ConfigurationError,
    PostroomError,
    QueueFull,
    TopicNotFound,
    acreate_outbox,
    create_outbox,
    outbox_stats,
)
from postroom.cli.main import postroom
from postroom.message import Message
from postroom.store.outbox import relay as relays
from postroom.store.outbox.relay import Relay

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with an empty outbox."""
    url: str = f"sqlite:///{tmp_path}/shop.db"
    if request.param != "sqlite":
        url = request.getfixturevalue(request.param)
    with connect(url) as connection:
        for table in ("postroom_outbox", "postroom_outbox_leader"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        create_outbox(connection)
        create_outbox(connection)
        connection.commit()
    return url


def connect(url: str) -> sa.Connection:
    driver = url.replace("postgresql:", "postgresql+psycopg:").replace("mysql:", "mysql+pymysql:")
    return sa.create_engine(driver, poolclass=sa.pool.NullPool).connect()


@pytest.fixture
def app() -> Iterator[App]:
    with App(f"memory://{uuid4().hex}") as made:
        define(made)
        yield made


def define(app: App) -> None:
    @app.task(queue="work", ordered=True)
    def book(number: int) -> None: ...


def enqueue(app: App, connection: Any, number: int, **options: Any) -> str:
    return app.tasks["book"].using(transaction=connection, **options).enqueue(number).id


def sending(answer: Callable[[Message], str | PostroomError]) -> tuple[list[str], Any]:
    sent: list[str] = []

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        answers = [answer(message) for message in messages]
        sent.extend(item for item in answers if isinstance(item, str))
        return answers

    return sent, publish


def test_what_was_committed_is_sent(app: App, database: str) -> None:
    with connect(database) as connection:
        kept = [enqueue(app, connection, number, key="k") for number in range(3)]
        connection.commit()
        enqueue(app, connection, 99)
        connection.rollback()
    assert app.stats()[0].ready == 0
    relay = Relay(database, app.outlet.send)
    assert relay.stats()[:2] == (3, 0)
    assert (relay.run_once(), relay.run_once()) == (3, 0)
    assert relay.stats() == (0, 0, None)
    assert [app.job(job_id).status().state for job_id in kept] == ["ready"] * 3
    relay.close()


def test_a_relay_that_dies_between_sending_and_removing(app: App, database: str) -> None:
    """What was sent is sent again under the same ids: one message of each."""
    with connect(database) as connection:
        ids = [enqueue(app, connection, number) for number in range(5)]
        connection.commit()

    class Died(BaseException):
        pass

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        app.outlet.send(messages)
        raise Died

    relay = Relay(database, publish)
    with pytest.raises(Died):
        relay.run_once()
    relay.close()
    after = Relay(database, app.outlet.send)
    assert after.run_once() == 5
    after.close()
    stats = app.stats()[0]
    assert stats.ready + stats.delayed == 5
    assert all(app.job(job_id).status() for job_id in ids)


def test_one_relay_is_active(app: App, database: str) -> None:
    with connect(database) as connection:
        enqueue(app, connection, 1)
        connection.commit()
    one, other = Relay(database, app.outlet.send), Relay(database, app.outlet.send)
    assert (one.run_once(), other.run_once(), one.run_once()) == (1, None, 0)
    one.close()
    assert other.run_once() == 0
    other.close()


def test_the_clock_is_set_back(app: App, database: str) -> None:
    """A relay that died before does not keep others from sending for all that time."""
    with connect(database) as connection:
        enqueue(app, connection, 1)
        connection.commit()
    dead, other = Relay(database, app.outlet.send), Relay(database, app.outlet.send)
    assert (dead.run_once(), other.run_once()) == (1, None)
    with connect(database) as connection:
        connection.execute(sa.text("UPDATE postroom_outbox_leader SET until = until + 3600"))
        connection.commit()
    assert other.run_once() == 0
    other.close()
    dead.close()


def test_order_and_poison(app: App, database: str) -> None:
    """Per key nothing overtakes what must wait; what can never be sent is set aside, and can be retried."""
    with connect(database) as connection:
        for number, key in enumerate("ababa"):
            enqueue(app, connection, number, key=key)
        connection.commit()
    full = True

    def answer(message: Message) -> str | PostroomError:
        if message.body == b'{"number":1}':
            return TopicNotFound("gone")
        return QueueFull("full") if full and message.body == b'{"number":2}' else message.body.decode()

    sent, publish = sending(answer)
    relay = Relay(database, publish)
    assert relay.run_once() == 2
    assert sent == ['{"number":0}', '{"number":3}']
    with pytest.raises(BrokerUnavailable, match="full"):
        relay.run_once()
    full = False
    assert relay.run_once() == 2
    assert sent[2:] == ['{"number":2}', '{"number":4}']
    assert [(message.body, why) for message, why in relay.set_aside()] == [(b'{"number":1}', "TopicNotFound: gone")]
    assert relay.stats()[:2] == (0, 1)
    assert relay.retry() == 1
    assert relay.stats()[:2] == (1, 0)
    relay.close()


def test_messages_of_many_keys_fill_batches(app: App, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch has two of one key; one key that has many does not make small batches of the others."""
    monkeypatch.setattr(relays, "BATCH", 4)
    with connect(database) as connection:
        for number, key in enumerate([*"aaaabbbbccccdddd", None, None]):
            enqueue(app, connection, number, key=key)
        connection.commit()
    batches: list[list[str]] = []

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        batches.append([str(message.key) for message in messages])
        return [message.id for message in messages]

    relay = Relay(database, publish)
    assert (relay.run_once(), relay.run_once()) == (18, 0)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 2]
    assert all(len(batch) == len(set(batch) - {"None"}) + batch.count("None") for batch in batches)
    relay.close()


def test_a_relay_that_was_frozen_sends_no_further_batch(
    app: App, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor has sent what comes after; it would send that again, out of order."""
    monkeypatch.setattr(relays, "LEASE", 0.2)
    monkeypatch.setattr(relays, "_RENEW", 0.1)
    with connect(database) as connection:
        for number in range(3):
            enqueue(app, connection, number, key="k")
        connection.commit()
    late: list[bytes] = []
    sent: list[bytes] = []

    def freeze(messages: Sequence[Message]) -> list[str | PostroomError]:
        late.extend(message.body for message in messages)
        wait_until(lambda: successor.run_once() is not None, "another takes over")
        return [message.id for message in messages]

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        sent.extend(message.body for message in messages)
        return [message.id for message in messages]

    frozen, successor = Relay(database, freeze), Relay(database, publish)
    assert frozen.run_once() == 1
    assert late == [b'{"number":0}']
    assert sent == [b'{"number":0}', b'{"number":1}', b'{"number":2}']
    frozen.close()
    successor.close()


def test_an_unavailable_broker_loses_nothing(app: App, database: str) -> None:
    with connect(database) as connection:
        enqueue(app, connection, 1)
        connection.commit()

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        raise BrokerUnavailable("away")

    relay = Relay(database, publish)
    with pytest.raises(BrokerUnavailable, match="away"):
        relay.run_once()
    assert relay.stats().waiting == 1
    relay.close()


def test_asyncpg_and_psycopg_connections(app: App, postgresql: str) -> None:
    with psycopg.connect(postgresql) as connection:
        connection.execute("DROP TABLE IF EXISTS postroom_outbox")
        create_outbox(connection)
        enqueue(app, connection, 1)

    async def main() -> None:
        async with asyncpg.create_pool(postgresql, min_size=1, max_size=1) as pool, pool.acquire() as connection:
            await acreate_outbox(connection)
            with pytest.raises(ConfigurationError, match="no transaction is open"):
                await app.tasks["book"].using(transaction=connection).aenqueue(2)
            async with connection.transaction():
                await app.tasks["book"].using(transaction=connection).aenqueue(2)
            for refused in (lambda: enqueue(app, connection, 3), lambda: outbox_stats(connection)):
                with pytest.raises(ConfigurationError, match="asynchronous"):
                    refused()

    asyncio.run(main())
    with psycopg.connect(postgresql) as connection:
        assert outbox_stats(connection)[:2] == (2, 0)
    relay = Relay(postgresql, app.outlet.send)
    assert relay.run_once() == 2
    relay.close()


def test_no_outbox_is_told(app: App, tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "empty.db")) as connection,
        pytest.raises(ConfigurationError, match="postroom outbox create"),
    ):
        outbox_stats(connection)
    with (
        closing(sqlite3.connect(tmp_path / "empty.db")) as connection,
        pytest.raises(ConfigurationError, match="create_outbox"),
    ):
        enqueue(app, connection, 1)
    relay = Relay(f"sqlite:///{tmp_path}/empty.db", app.outlet.send)
    with pytest.raises(ConfigurationError, match="create_outbox"):
        relay.run_once()
    with pytest.raises(ConfigurationError, match="database's URL"):
        Relay("nosuch://x", app.outlet.send)


APP = """
from postroom import App
app = App()

@app.task(queue="work")
def book(number: int) -> None: ...
"""


@pytest.mark.slow
def test_relays_killed_under_load(tmp_path: Path, postgresql: str) -> None:
    """Thousands of rows, a third rolled back, relays killed all the while: each committed one arrives once."""
    (tmp_path / "shop.py").write_text(APP)
    broker = f"sqlite:///{tmp_path}/broker.db"
    environment = {**os.environ, "POSTROOM_BROKER": broker, "POSTROOM_OUTBOX": postgresql}
    command = [sys.executable, "-m", "postroom", "outbox", "relay", "shop:app"]

    def start() -> subprocess.Popen[bytes]:
        with open(tmp_path / "relay.log", "ab") as log:
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    committed: list[str] = []
    with App(broker) as app, psycopg.connect(postgresql) as connection:
        define(app)
        for table in ("postroom_outbox", "postroom_outbox_leader"):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
        create_outbox(connection)
        connection.commit()
        relays = [start(), start()]
        try:
            for batch in range(100):
                using = app.tasks["book"].using(transaction=connection)
                ids = [job.id for job in using.enqueue_many(using.call(batch) for _ in range(100))]
                if batch % 3 == 2:
                    connection.rollback()
                    continue
                connection.commit()
                committed += ids
                if batch % 20 == 10:
                    victim = relays.pop(0)
                    victim.kill()
                    victim.wait()
                    relays.append(start())
            watching = Relay(postgresql, app.outlet.send)
            wait_until(lambda: watching.stats().waiting == 0, "the outbox is empty", 60)
            assert watching.stats().set_aside == 0
            watching.close()
            for relay in relays:
                relay.send_signal(signal.SIGTERM)
                assert relay.wait(20) == 0
        finally:
            for relay in relays:
                relay.kill()
                relay.wait()
        found = Counter(record.id for record in app.thread.call(lambda b: b.jobs.search(limit=100_000)))
    assert found == Counter(committed)


def test_a_relay_is_woken_by_the_commit(app: App, database: str) -> None:
    """By a notification, or by a look that costs next to nothing; MariaDB has neither, and is looked into often."""
    relay, stop = Relay(database, app.outlet.send), threading.Event()
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        with connect(database) as connection:
            waits = []
            for number in range(9):
                time.sleep(0.1)
                enqueue(app, connection, number)
                assert app.stats()[0].ready == number
                connection.commit()
                begin = time.monotonic()
                wait_until(lambda number=number: app.stats()[0].ready == number + 1, "it was sent")
                waits.append(time.monotonic() - begin)
    finally:
        stop.set()
        thread.join(20)
        relay.close()
    # Were it not woken it would look once a second.
    assert sorted(waits)[4] < 0.35, waits


def test_an_outage_ends_in_order(app: App, database: str) -> None:
    """While the broker is away nothing is lost or overtaken; when it is back everything goes out."""
    away = threading.Event()
    away.set()
    attempts: list[int] = []
    sent: list[int] = []

    def publish(messages: Sequence[Message]) -> list[str | PostroomError]:
        attempts.append(len(messages))
        if away.is_set() or len(attempts) % 3 == 0:
            raise BrokerUnavailable("away")
        sent.extend(json.loads(message.body)["number"] for message in messages)
        return [message.id for message in messages]

    relay, stop = Relay(database, publish), threading.Event()
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        with connect(database) as connection:
            for number in range(60):
                enqueue(app, connection, number, key=str(number % 7))
                connection.commit()
        wait_until(lambda: len(attempts) > 1, "it tries")
        away.clear()
        wait_until(lambda: len(set(sent)) == 60, "all were sent", 30)
    finally:
        stop.set()
        thread.join(20)
        relay.close()
    for line in range(7):
        of_key = list(dict.fromkeys(number for number in sent if number % 7 == line))
        assert of_key == sorted(of_key)
    assert len(attempts) < 60, "a relay that cannot send must not hammer"


def test_a_worker_relays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    with App(f"memory://{uuid4().hex}") as app, closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        done: list[int] = []

        @app.task
        def book(number: int) -> None:
            done.append(number)

        create_outbox(connection)
        connection.commit()
        with working(app, relay=url):
            book.using(transaction=connection).enqueue(1)
            connection.commit()
            wait_until(lambda: done == [1], "it was relayed and handled")
        connection.execute("DROP TABLE postroom_outbox_leader")
        with pytest.raises(ConfigurationError, match="create_outbox"), working(app, relay=url):
            wait_until(lambda: "postroom-relay" not in {thread.name for thread in threading.enumerate()}, "it fails")
        with pytest.raises(ConfigurationError, match="--drain"):
            app.run_worker(relay=url, drain=True)


def test_the_commands(tmp_path: Path, postgresql: str) -> None:
    """``postroom outbox`` and ``postroom inbox``, as operators use them."""

    def run(*command: str) -> str:
        done = CliRunner().invoke(postroom, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    for url in (postgresql, f"sqlite:///{tmp_path}/shop.db"):
        with connect(url) as connection:
            for table in ("postroom_outbox", "postroom_outbox_leader", "postroom_inbox"):
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
            connection.commit()
        for _ in range(2):
            assert run("inbox", "create", "--database", url) == "the inbox is there\n"
            assert run("outbox", "create", "--database", url) == "the outbox is there\n"
        assert run("inbox", "status", "--database", url) == "marks: 0\n"
        with connect(url) as connection:
            connection.execute(sa.text("INSERT INTO postroom_inbox VALUES ('s', 'm', 0, NULL)"))
            connection.commit()
        assert json.loads(run("inbox", "status", "--json", "--database", url)) == {"marks": 1, "oldest": 0.0}
        assert run("inbox", "purge", "--older-than", "60", "--database", url) == "1 marks deleted\n"
        status = json.loads(run("outbox", "status", "--json", "--database", url))
        assert status == {"waiting": 0, "set_aside": 0, "oldest": None, "lag": None, "messages": []}
