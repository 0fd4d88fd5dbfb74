"""Getting in: TLS and passwords, or by way of PgBouncer; and what is said of who is kept out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from services.certificates import make_certificate
from services.postgresql import PgBouncer, PostgreSQLServer
from tests.conformance.test_stored import Poor
from tests.conftest import working
from tests.servers import started

from postroom import App, RetryPolicy
from postroom.broker.base import Ack, Dead, Retry, Subscription, Topic
from postroom.broker.postgresql import PostgreSQLBroker
from postroom.broker.postgresql.address import parse
from postroom.broker.postgresql.link import Link
from postroom.errors import BrokerUnavailable, ConfigurationError, PostroomError
from postroom.message import Failure, JobState, Message, new_id
from postroom.store.beside import StoredBroker
from postroom.store.postgresql import PostgreSQLStore


class Place(NamedTuple):
    server: PostgreSQLServer
    authority: Path

    def url(self, password: str, **options: object) -> str:
        """For ``shop``, who is let in by TLS with ``p@ss``."""
        told = "".join(f"&{name}={value}" for name, value in options.items())
        return f"postgresql://shop:{password}@127.0.0.1:{self.server.port}/shop?migrate=auto{told}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = make_certificate(tmp_path_factory.mktemp("certificate"))
    with started(PostgreSQLServer(tmp_path_factory.mktemp("postgresql"), certificate=made)) as server:
        assert isinstance(server, PostgreSQLServer)
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE USER shop PASSWORD 'p@ss'")
            connection.execute("CREATE DATABASE shop OWNER shop")
            connection.execute("ALTER SYSTEM SET log_statement = 'all'")
            connection.execute("SELECT pg_reload_conf()")
        yield Place(server, made.certificate)


@pytest.fixture(scope="module")
def pooler(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PgBouncer]:
    with started(PgBouncer(tmp_path_factory.mktemp("pgbouncer"), server=place.server.port)) as made:
        assert isinstance(made, PgBouncer)
        yield made


async def live(url: str) -> dict[str, str]:
    """The life of three messages, one of which is tried again; and what the doctor says."""
    broker = PostgreSQLBroker(url)
    await broker.connect()
    try:
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        ids = [new_id() for _ in range(3)]
        await broker.publish([Message(id=each, topic="q", name="n", body=b"1") for each in ids])
        consumer = await broker.consume("q")
        one, other, late = await consumer.receive(3, 10.0)
        failure = Failure(attempt=1, reason="error")
        outcomes = [(one, Ack()), (other, Dead(failure)), (late, Retry(delay=0.3, failure=failure))]
        assert await consumer.settle(outcomes) == [None] * 3
        assert await broker.redrive("q", [other.message.id]) == [other.message.id]
        back: dict[str, int] = {}
        while len(back) < 2:
            for delivery in await consumer.receive(2, 10.0):
                back[delivery.message.id] = delivery.attempt
                assert await consumer.extend([delivery]) == []
                assert await consumer.settle([(delivery, Ack())]) == [None]
        assert back[late.message.id] == 2
        return {finding.title: finding.detail for finding in await broker.examine()}
    finally:
        await broker.close()


def refusal(url: str, error: type[PostroomError]) -> str:
    """What is said, with its cause."""
    with pytest.raises(error) as caught:
        asyncio.run(live(url))
    return f"{caught.value} {caught.value.__cause__!r}"


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
def test_a_password_over_tls(place: Place, mode: str) -> None:
    told = asyncio.run(live(place.url("p%40ss", sslmode=mode, sslrootcert=place.authority)))
    assert told["encryption"] == "TLS"


def test_tls_is_used_where_it_is_offered(place: Place) -> None:
    assert asyncio.run(live(place.url("p%40ss")))["encryption"] == "TLS"


def test_a_wrong_password_is_told_without_it(place: Place) -> None:
    said = refusal(place.url("not-it", sslmode="verify-full", sslrootcert=place.authority), ConfigurationError)
    assert 'refuses: password authentication failed for user "shop"' in said
    assert "not-it" not in said


def test_a_server_nobody_vouches_for(place: Place, tmp_path: Path) -> None:
    stranger = make_certificate(tmp_path).certificate
    said = refusal(place.url("p%40ss", sslmode="verify-full", sslrootcert=stranger), BrokerUnavailable)
    assert "certificate verify failed" in said
    assert "p%40ss" not in said
    assert "p@ss" not in said


def test_plain_text_where_the_server_demands_tls(place: Place) -> None:
    said = refusal(place.url("p%40ss", sslmode="disable"), ConfigurationError)
    assert "no encryption" in said
    assert "p@ss" not in said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sslmode": "verify"}, "must be one of: disable"),
        ({"sslmode": "verify-full", "sslrootcert": "/nowhere.pem"}, r"/nowhere\.pem"),
    ],
)
def test_what_cannot_be_meant(place: Place, options: dict[str, str], match: str) -> None:
    assert re.search(match, refusal(place.url("p%40ss", **options), ConfigurationError))


def test_through_a_pooler(place: Place, pooler: PgBouncer) -> None:
    """Each transaction is on another connection: nothing may depend on what was said before."""
    before = len(log_of(place))
    asyncio.run(live(f"{pooler.url}?migrate=auto&pgbouncer=1"))
    said = log_of(place)[before:]
    assert "execute <unnamed>: SELECT" in said
    assert not re.search(r"execute (?!<unnamed>)|: LISTEN", said)


def test_a_store_behind_a_pooler(place: Place, pooler: PgBouncer) -> None:
    async def run() -> None:
        store = PostgreSQLStore(f"{pooler.url}?migrate=auto&pgbouncer=1&schema=stored")
        broker = StoredBroker(Poor(f"memory://{uuid4().hex}"), store)
        await broker.connect()
        await broker.declare([Topic(name="q", queue=True)], [Subscription(name="q", pattern="q")])
        sent = [Message(id=new_id(), topic="q", name="n", body=b"%d" % n, idempotency_key=f"k{n}") for n in range(9)]
        assert await broker.publish(sent) == [message.id for message in sent]
        consumer = await broker.consume("q")
        deliveries = await consumer.receive(9, 5.0)
        assert await consumer.settle([(delivery, Ack(b"1")) for delivery in deliveries]) == [None] * 9
        states = [record.state for message in sent for record in await broker.jobs.get(message.id)]
        assert states == [JobState.SUCCEEDED] * 9
        await broker.close()

    before = len(log_of(place))
    asyncio.run(run())
    assert not re.search(r"execute (?!<unnamed>)", log_of(place)[before:])


def test_a_worker_behind_a_pooler(pooler: PgBouncer) -> None:
    with App(f"{pooler.url}?migrate=auto&pgbouncer=1&schema=worked") as app:
        tries = []

        @app.task(queue="q", retry=RetryPolicy(backoff=lambda attempt: 0.3))
        def work(number: int) -> int:
            tries.append(number)
            if tries.count(number) < 2:
                raise ValueError("not yet")
            return number

        with working(app):
            jobs = work.enqueue_many(work.call(number) for number in range(20))
            assert [job.result(timeout=30) for job in jobs] == list(range(20))
    assert sorted(tries) == sorted([*range(20), *range(20)])


def test_a_pooler_that_is_not_told_of(pooler: PgBouncer) -> None:
    said = refusal(f"{pooler.url}?migrate=auto", ConfigurationError)
    assert "pooler" in said
    assert "pgbouncer=1" in said


def test_a_pooler_that_takes_any_greeting(place: Place) -> None:
    """Then it is a statement that is missing, as here."""

    async def run() -> None:
        link = Link(parse(place.server.url))
        await link.open()
        try:
            await link.fetch("EXECUTE prepared_by_another_session")
        finally:
            await link.close()

    with pytest.raises(ConfigurationError, match=r"pooler, it seems \(prepared statement .* exist\): put pgbouncer=1"):
        asyncio.run(run())


def log_of(place: Place) -> str:
    return (place.server.folder / "log").read_text()


def test_a_client_that_has_lost_its_way(place: Place) -> None:
    """It tells, by an error of its own, where a server ends while an answer is awaited: there is another connection."""

    async def run() -> None:
        link = Link(parse(place.server.url), connections=1)
        await link.open()
        pids = []

        async def lost(connection: Any) -> None:
            pids.append(await connection.fetchval("SELECT pg_backend_pid()"))
            raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

        with pytest.raises(BrokerUnavailable, match="another operation"):
            await link._using(lost)
        assert [await link.value("SELECT pg_backend_pid()")] != pids
        await link.close()

    asyncio.run(run())
