"""Enqueued in a transaction of the queue's own database: by every library, there if and only if it commits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from tests.conftest import wait_until

from postroom import App, ConfigurationError, JobNotFound, JobState


@pytest.fixture
def app(postgresql: str) -> Iterator[App]:
    made = App(f"{postgresql}?schema=joining&migrate=auto")

    @made.task(queue="joined")
    def double(number: int) -> int:
        return 2 * number

    yield made
    made.close()


def enqueue(app: App, number: int, **options: Any) -> Any:
    return app.tasks["double"].using(**options).enqueue(number)


def aenqueue(app: App, number: int, **options: Any) -> Any:
    return app.tasks["double"].using(**options).aenqueue(number)


def exists(job: Any) -> bool:
    try:
        job.status()
    except JobNotFound:
        return False
    return True


@contextmanager
def _psycopg(url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(url) as connection:
        yield connection


def _alchemy(kind: Callable[[sa.Engine], AbstractContextManager[Any]]) -> Callable[[str], AbstractContextManager[Any]]:
    @contextmanager
    def opened(url: str) -> Iterator[Any]:
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        with kind(engine) as connection:
            yield connection
        engine.dispose()

    return opened


PLAIN = {"psycopg": _psycopg, "sqlalchemy": _alchemy(lambda e: e.connect()), "session": _alchemy(Session)}


@pytest.mark.parametrize("library", PLAIN)
def test_committed_or_not_there(app: App, postgresql: str, library: str) -> None:
    with PLAIN[library](postgresql) as connection:
        kept = enqueue(app, 4, transaction=connection)
        assert not exists(kept), "before the commit nobody sees it"
        connection.commit()
        dropped = enqueue(app, 5, transaction=connection)
        connection.rollback()
    assert kept.status().state is JobState.READY
    assert not exists(dropped)
    app.run_worker(drain=True)
    assert kept.result(timeout=5) == 8


def test_a_failed_statement_is_raised_as_it_is(app: App, postgresql: str) -> None:
    """Callers know their library's errors, and try again by them; one that is its own cause cannot be printed."""
    with psycopg.connect(postgresql) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction) as plain:
            enqueue(app, 4, transaction=connection)
        connection.rollback()

    async def main() -> BaseException:
        async with await psycopg.AsyncConnection.connect(postgresql) as connection:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await connection.execute("SELECT 1 / 0")
            with pytest.raises(psycopg.errors.InFailedSqlTransaction) as awaited:
                await aenqueue(app, 4, transaction=connection)
            await connection.rollback()
        return awaited.value

    for error in (plain.value, asyncio.run(main())):
        assert error.__cause__ is not error


def _asyncpg(app: App, url: str) -> Any:
    async def run() -> tuple[Any, Any]:
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            async with pool.acquire() as connection, connection.transaction():
                kept = await aenqueue(app, 4, transaction=connection)
            connection = await pool.acquire()
            transaction = connection.transaction()
            await transaction.start()
            dropped = await aenqueue(app, 5, transaction=connection)
            await transaction.rollback()
            await pool.release(connection)
            return kept, dropped

    return run()


def _apsycopg(app: App, url: str) -> Any:
    async def run() -> tuple[Any, Any]:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            kept = await aenqueue(app, 4, transaction=connection)
            await connection.commit()
            dropped = await aenqueue(app, 5, transaction=connection)
            await connection.rollback()
            return kept, dropped

    return run()


def _aalchemy(made: Callable[[Any], Any], driver: str) -> Callable[[App, str], Any]:
    async def run(app: App, url: str) -> tuple[Any, Any]:
        engine = create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"))
        async with made(engine) as connection:
            kept = await aenqueue(app, 4, transaction=connection)
            await connection.commit()
            dropped = await aenqueue(app, 5, transaction=connection)
            await connection.rollback()
        await engine.dispose()
        return kept, dropped

    return run


AWAITED = {
    "asyncpg": _asyncpg,
    "psycopg": _apsycopg,
    "sqlalchemy on asyncpg": _aalchemy(lambda engine: engine.connect(), "asyncpg"),
    "session on psycopg": _aalchemy(AsyncSession, "psycopg"),
}


@pytest.mark.parametrize("library", AWAITED)
def test_committed_or_not_there_awaited(app: App, postgresql: str, library: str) -> None:
    kept, dropped = asyncio.run(AWAITED[library](app, postgresql))
    assert kept.status().state is JobState.READY
    assert not exists(dropped)
    app.run_worker(drain=True)
    assert kept.result(timeout=5) == 8


DJANGO = """
import sys
from urllib.parse import urlsplit
import django
from django.conf import settings

url = urlsplit(sys.argv[1])
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "USER": url.username, "HOST": url.hostname,
    "PORT": url.port,
}})
django.setup()
from django.db import connection, transaction
from postroom import App

app = App(f"{sys.argv[1]}?schema=joining&migrate=auto")

@app.task(queue="joined")
def double(number: int) -> int:
    return 2 * number

with transaction.atomic():
    print(double.using(transaction=connection).enqueue(4).id)
try:
    with transaction.atomic():
        print(double.using(transaction=connection).enqueue(5).id)
        raise KeyError
except KeyError:
    pass
try:
    double.using(transaction=connection).enqueue(6)
except Exception as error:
    print(type(error).__name__)
app.close()
"""


def test_django(app: App, postgresql: str) -> None:
    command = [sys.executable, "-c", DJANGO, postgresql]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    kept, dropped, refusal = told.stdout.split()
    assert app.job(kept).status().state is JobState.READY
    assert not exists(app.job(dropped))
    assert refusal == "ConfigurationError", "without a transaction each statement commits by itself"
    app.run_worker(drain=True)
    assert app.job(kept).result(timeout=5) == 8


def test_a_waiting_worker_is_woken_by_the_commit(app: App, postgresql: str) -> None:
    async def run() -> float:
        broker = app.make_broker()
        await broker.connect()
        consumer = await broker.consume("joined")
        waiting = asyncio.ensure_future(consumer.receive(1, 10.0))
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(wait_until, lambda: broker.hinted, "the worker listens")
        connection = await asyncpg.connect(postgresql)
        async with connection.transaction():
            await aenqueue(app, 4, transaction=connection)
        committed = loop.time()
        assert await waiting
        took = loop.time() - committed
        await broker.close()
        await connection.close()
        return took

    enqueue(app, 1)
    app.run_worker(drain=True)
    # Whoever looks only now and then would take half a second on average.
    assert sorted(asyncio.run(run()) for _ in range(3))[1] < 0.3
    app.run_worker(drain=True)


def test_in_a_transaction_keys_and_limits_hold_too(app: App, postgresql: str) -> None:
    with _psycopg(postgresql) as connection:
        first = enqueue(app, 7, transaction=connection, idempotency_key="k7")
        again = enqueue(app, 7, transaction=connection, idempotency_key="k7")
        assert first.id == again.id
        connection.commit()
    assert enqueue(app, 7, idempotency_key="k7").id == first.id
    app.run_worker(drain=True)


def test_other_connections_are_told_apart(app: App, postgresql: str) -> None:
    broker = app.make_broker()
    with closing(psycopg.connect(postgresql)) as ours:
        assert broker.joins(ours)
        where = f"dbname=template1 host=127.0.0.1 user=postgres port={ours.info.port}"
    with closing(psycopg.connect(where)) as other:
        assert not broker.joins(other)
        with pytest.raises(ConfigurationError, match="not to the broker's database"):
            broker.publish_in(other, [])
    alone = psycopg.connect(postgresql, autocommit=True)
    with closing(alone), pytest.raises(ConfigurationError, match="no transaction is open"):
        enqueue(app, 1, transaction=alone)
    assert not broker.joins("no connection")


def test_a_connection_that_must_be_awaited_says_so(app: App, postgresql: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(postgresql)
        async with connection.transaction():
            with pytest.raises(ConfigurationError, match="begins with a"):
                await asyncio.to_thread(enqueue, app, 1, transaction=connection)
        await connection.close()

    asyncio.run(run())
