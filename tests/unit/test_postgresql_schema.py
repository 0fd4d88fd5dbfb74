"""The tables in a database of the user: made by command, seen before, never newer or older than what uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner

from postroom.broker.postgresql import PostgreSQLBroker
from postroom.broker.postgresql.address import parse
from postroom.broker.postgresql.link import Link
from postroom.broker.postgresql.schema import QUEUES, Schema
from postroom.cli.main import postroom
from postroom.errors import ConfigurationError
from postroom.store.postgresql import PostgreSQLStore
from tests.servers import url_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("postgresql", tmp_path_factory) as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    return f"{server}?schema=t{uuid4().hex[:12]}"


def connect(url: str) -> None:
    async def run() -> None:
        broker = PostgreSQLBroker(url)
        await broker.connect()
        assert await broker.stats() == []
        await broker.close()

    asyncio.run(run())


def migrate(*arguments: str) -> str:
    done = CliRunner().invoke(postroom, ["migrate", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_nothing_is_created_silently(url: str) -> None:
    with pytest.raises(ConfigurationError, match="postroom migrate --apply"):
        connect(url)
    assert "CREATE TABLE message" in migrate(url)
    with pytest.raises(ConfigurationError, match="does not exist"):
        connect(url)
    assert "steps done: 1" in migrate(url, "--apply")
    connect(url)
    assert "nothing to do" in migrate(url)
    assert "nothing to do" in migrate(url, "--apply")


def test_the_shown_sql_is_what_it_takes(server: str, url: str) -> None:
    async def plan() -> list[str]:
        return await PostgreSQLBroker(url).plan()

    for step in asyncio.run(plan()):
        with psycopg.connect(server) as connection:
            connection.execute(step.encode())
    connect(url)


def test_development_may_have_it_made_at_every_start(url: str) -> None:
    connect(f"{url}&migrate=auto")
    connect(f"{url}&migrate=auto")
    connect(url)


def test_many_at_once_make_it_once(url: str) -> None:
    async def run() -> None:
        brokers = [PostgreSQLBroker(f"{url}&migrate=auto") for _ in range(4)]
        await asyncio.gather(*(broker.connect() for broker in brokers))
        for broker in brokers:
            await broker.close()

    asyncio.run(run())


def test_a_store_comes_by_the_same_command(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect_store(url: str) -> None:
        store = PostgreSQLStore(url)
        await store.connect()
        try:
            assert await store.jobs.search() == []
            assert {finding.level for finding in await store.examine()} <= {"ok", "warning"}
        finally:
            await store.close()

    with pytest.raises(ConfigurationError, match="by postroom migrate --store --apply, or put"):
        asyncio.run(connect_store(url))
    assert "CREATE TABLE record" in migrate("--store", url)
    assert "steps done: 1" in migrate("--store", url, "--apply")
    asyncio.run(connect_store(url))
    assert "nothing to do" in migrate("--store", url, "--apply")
    asyncio.run(connect_store(f"{url}_auto&migrate=auto"))
    # Beside a broker it is migrated with it.
    monkeypatch.setenv("POSTROOM_STORE", f"{url}_beside")
    assert "CREATE TABLE record" in migrate("sqs://eu-west-1")
    assert "steps done: 1" in migrate("sqs://eu-west-1", "--apply")
    asyncio.run(connect_store(f"{url}_beside"))


def test_a_broker_and_a_store_are_not_named_at_once(url: str) -> None:
    refused = CliRunner().invoke(postroom, ["migrate", "sqs://eu-west-1", "--store", url])
    assert refused.exit_code == 2
    assert "or --store" in refused.output


def test_a_step_that_fails_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {name: QUEUES.source(name) for name in QUEUES.steps[0]}
    broken = sources | {"operate": f"{sources['operate']}\nSELECT 1 / 0;"}
    monkeypatch.setattr(Schema, "source", lambda _, name: broken[name])
    assert CliRunner().invoke(postroom, ["migrate", url, "--apply"]).exit_code == 1
    monkeypatch.undo()
    assert "steps to do: 1" in migrate(url)


def test_a_newer_schema_is_refused(server: str, url: str) -> None:
    migrate(url, "--apply")
    with psycopg.connect(server) as connection:
        connection.execute(f"INSERT INTO {parse(url).schema}.version VALUES (99)".encode())
    for change in ("", "&migrate=auto"):
        with pytest.raises(ConfigurationError, match=r"newer Postroom.*upgrade"):
            connect(url + change)


def test_what_is_missing_later_is_told(server: str, url: str) -> None:
    async def run() -> None:
        broker = PostgreSQLBroker(f"{url}&migrate=auto")
        await broker.connect()
        with psycopg.connect(server) as connection:
            connection.execute(f"DROP SCHEMA {parse(url).schema} CASCADE".encode())
        with pytest.raises(ConfigurationError, match="run postroom migrate"):
            await broker.stats()
        await broker.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://h/d?schma=x", "did you mean 'schema'"),
        ("postgresql://h/d?schema=Big", "schema='Big': use"),
        ("postgresql://h/d?schema=pg_x", "not beginning with pg_"),
        ("postgresql://h/d?migrate=yes", "write migrate=never or migrate=auto"),
        ("postgresql://h/d?pgbouncer=yes", "write pgbouncer=0 or pgbouncer=1"),
        ("postgresql://h:x/d", "the port must be a number"),
        ("mysql://h/d", "write postgresql://"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told.replace("?", r"\?")):
        PostgreSQLBroker(url)


def test_no_error_shows_a_password() -> None:
    async def run() -> None:
        link = Link(parse("postgresql://ada:s3cret@127.0.0.1:1/shop"))
        await link.open()
        try:
            await link.fetch("SELECT 1")
        finally:
            await link.close()

    with pytest.raises(Exception, match="cannot be reached") as refusal:
        asyncio.run(run())
    assert "s3cret" not in str(refusal.value)
    with pytest.raises(ConfigurationError) as refusal:
        parse("postgresql://ada:s3cret@h/d?wrong=1")
    assert "s3cret" not in str(refusal.value)


def test_a_place_is_told_by_host_port_and_name() -> None:
    assert parse("postgresql://localhost/shop").place == parse("postgres://127.0.0.1:5432/shop").place
    assert parse("postgresql:///shop?host=/run/postgresql").place == parse("postgresql://localhost/shop").place
    assert parse("postgresql://a,b:6000/shop").place.hosts == {("a", 5432), ("b", 6000)}
    assert parse("postgresql://h/shop").place != parse("postgresql://h/other").place
