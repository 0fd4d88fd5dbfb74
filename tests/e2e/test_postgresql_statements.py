"""What ``ctx.once`` sends to the database, heard on the wire: one statement, for each kind of connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apsw
import pytest
import sqlalchemy as sa
from tests.faults.proxy import Proxy
from tests.servers import url_of
from tests.transactions import ASYNC, SYNC, database_of, engine_of, run

from postroom import Context, create_inbox
from postroom.message import Message, new_id

PAY = "UPDATE account SET amount = amount - 10"


class Ear(Proxy):
    """Keeps what clients say, one stream a connection."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.streams: list[bytearray] = []

    async def _requests(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        heard = bytearray()
        self.streams.append(heard)
        while data := await reader.read(65_536):
            heard += data
            server.write(data)
            await server.drain()
        raise ConnectionResetError


def of_postgresql(stream: bytes) -> int:
    """Queries and executions (PostgreSQL documentation, 55.7: a type, a length that counts itself, the rest)."""
    position = 0
    # Before the start-up message a client may ask for encryption; each of these has no type.
    while stream[position + 4 : position + 8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):
        position += 8
    position += int.from_bytes(stream[position : position + 4])
    count = 0
    while position < len(stream):
        count += stream[position : position + 1] in (b"Q", b"E")
        position += 1 + int.from_bytes(stream[position + 1 : position + 5])
    return count


def of_mysql(stream: bytes) -> int:
    """Commands that query or execute (MariaDB documentation, protocol: length, sequence from 0, command)."""
    position = count = 0
    while position < len(stream):
        count += stream[position + 3] == 0 and stream[position + 4] in (0x03, 0x17)
        position += 4 + int.from_bytes(stream[position : position + 3], "little")
    return count


@pytest.fixture(scope="module")
def ears(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ear]]:
    with (
        url_of("postgresql", tmp_path_factory) as postgresql,
        url_of("mariadb", tmp_path_factory) as mariadb,
        pytest.MonkeyPatch.context() as environment,
        listening(sa.make_url(postgresql)) as one,
        listening(sa.make_url(mariadb)) as other,
    ):
        environment.setenv("SHOP_FOLDER", str(tmp_path_factory.mktemp("shop")))
        for name, url, ear in (("POSTGRESQL", postgresql, one), ("MYSQL", mariadb, other)):
            heard = sa.make_url(url).set(port=ear.port)
            environment.setenv(f"SHOP_{name}", heard.render_as_string(hide_password=False))
        yield {"postgresql": one, "mysql": other}


@contextmanager
def listening(url: sa.URL) -> Iterator[Ear]:
    made = Ear(url.port or 0)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def test_the_counters_count(ears: dict[str, Ear]) -> None:
    for way, count, of in (("connection-postgresql", of_postgresql, 3), ("connection-mysql", of_mysql, 3)):
        with engine_of(way, "").connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            stream = ears[database_of(way)].streams[-1]
            before = count(bytes(stream))
            for _ in range(of):
                connection.execute(sa.text("SELECT 1"))
            assert count(bytes(stream)) - before == of


@pytest.mark.parametrize("way", [*SYNC, *ASYNC])
def test_one_statement(way: str, ears: dict[str, Ear]) -> None:
    with engine_of(way, "pay").begin() as connection:
        for table in ("account", "postroom_inbox"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(sa.text("CREATE TABLE account (amount INTEGER)"))
        create_inbox(connection)
    without, with_mark = (statements(way, ears, ctx) for ctx in (None, context()))
    assert with_mark == without + 1


def statements(way: str, ears: dict[str, Ear], ctx: Context | None) -> int:
    """Of a transaction that updates one row, from its connection's begin to its end."""
    traced: list[str] = []
    if way in SYNC:
        pay(way, ctx, traced)
    else:
        asyncio.run(apay(way, ctx, traced))
    if database_of(way) == "sqlite":
        assert any(PAY in statement for statement in traced)
        return len(traced)
    stream = bytes(ears[database_of(way)].streams[-1])
    assert PAY.encode() in stream
    return (of_postgresql if database_of(way) == "postgresql" else of_mysql)(stream)


def pay(way: str, ctx: Context | None, traced: list[str]) -> None:
    with SYNC[way](way, "pay") as connection:
        if database_of(way) == "sqlite":
            trace(connection, traced)
        if ctx is not None:
            ctx.once(connection)
        run(connection, PAY)


async def apay(way: str, ctx: Context | None, traced: list[str]) -> None:
    async with ASYNC[way](way, "pay") as connection:
        if database_of(way) == "sqlite":
            await (await connection.connection()).run_sync(lambda inner: trace(inner, traced))
        if ctx is not None:
            await ctx.aonce(connection)
        await run(connection, PAY)


def trace(connection: Any, traced: list[str]) -> None:
    if isinstance(connection, apsw.Connection):
        connection.set_exec_trace(lambda cursor, sql, bindings: traced.append(sql) or True)
        return
    if isinstance(connection, sa.orm.Session):
        connection = connection.connection()
    elif not isinstance(connection, sa.Connection) and hasattr(connection, "ensure_connection"):
        connection = connection.connection
    if isinstance(connection, sa.Connection):
        connection = connection.connection.driver_connection
    getattr(connection, "_conn", connection).set_trace_callback(traced.append)


def context() -> Context:
    return Context(Message(id=new_id(), topic="t", name="t", body=b""), "bookkeeping", 1, 5)
