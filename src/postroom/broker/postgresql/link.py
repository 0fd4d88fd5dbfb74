"""The connections for statements, and what the server's errors mean. What may have been done is never done again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import asyncpg

from postroom.broker.postgresql.address import Address
from postroom.errors import BrokerClosed, BrokerUnavailable, ConfigurationError

T = TypeVar("T")

TIMEOUT = 15.0
"""Seconds without an answer after which a connection counts as lost: a server that hangs must not hang a worker."""
CONNECTIONS = 4
"""Statements under way at once; more wait for their turn."""
_TRIES = 3

GONE = "PR404"
"""The SQLSTATE by which our functions say that there is no such subscription."""

# Class 42 holds what the server does not know or allow; 3D000 and 28xxx that it does not let us in.
_MISSING = ("3F000", "42P01", "42883", "42703")
_REFUSED = ("28", "3D", "42501")
_AGAIN = ("40001", "40P01")
# What a pooler gives to one server connection is not there on the next.
_POOLED = ("26000", "42P05")


class Gone(Exception):
    """The subscription is not declared; nothing was done."""


class Link:
    """Opened by ``open``, not by the constructor. In SQL ``~.`` stands for the schema."""

    def __init__(self, address: Address, *, connections: int = CONNECTIONS) -> None:
        self.address = address
        self._connections = connections
        self._pool: asyncpg.Pool[Any] | None = None
        self._statements: dict[str, str] = {}
        self._running = 0
        self._quiet = asyncio.Event()
        self.closed = False

    @property
    def connected(self) -> bool:
        return self._pool is not None

    async def open(self) -> None:
        """Connects at the first statement. Raises ``ConfigurationError``."""
        if missing := [file for file in self.address.files if not os.access(file, os.R_OK)]:
            # The client would not say which.
            raise ConfigurationError(f"{self.address.shown}: cannot read {', '.join(missing)}")
        try:
            with self.translated():
                self._pool = await asyncpg.create_pool(
                    min_size=0, max_size=self._connections, reset=_keep_as_it_is, **self.arguments()
                )
        except ValueError as error:
            raise ConfigurationError(f"{self.address.shown}: {error}") from error

    async def close(self) -> None:
        """Let what is under way end, then disconnect; a second call is fine."""
        self.closed = True
        pool, self._pool = self._pool, None
        if pool is None:
            return
        while self._running:
            # A pool that is closed while it connects confuses its connections.
            self._quiet.clear()
            await self._quiet.wait()
        try:
            await asyncio.wait_for(pool.close(), TIMEOUT)
        except TimeoutError:
            pool.terminate()

    def arguments(self) -> dict[str, Any]:
        """How to connect, whether for statements or to listen."""
        made: dict[str, Any] = {"dsn": self.address.url, "command_timeout": TIMEOUT, "timeout": TIMEOUT}
        if self.address.pgbouncer:
            # The next transaction may be on a server connection that does not know a statement prepared before.
            return made | {"statement_cache_size": 0}
        settings = {"application_name": "postroom", "default_transaction_isolation": "read committed"}
        return made | {"server_settings": settings}

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """One statement, a transaction of its own. Raises ``BrokerClosed``, ``BrokerUnavailable`` or :class:`Gone`."""
        if self.address.pgbouncer:
            # Preparing and running it must meet the same server connection.
            return await self.transact(lambda connection: connection.fetch(self.statement(sql), *values))
        return await self._using(lambda connection: connection.fetch(self.statement(sql), *values))

    async def value(self, sql: str, *values: Any) -> Any:
        """The first column of the only row."""
        return (await self.fetch(sql, *values))[0][0]

    async def transact(self, run: Callable[[Any], Awaitable[T]]) -> T:
        """``run(connection)`` in a transaction; again if another was in its way. Raises as ``fetch``."""

        async def whole(connection: Any) -> T:
            async with connection.transaction(isolation="read_committed"):
                return await run(connection)

        return await self._using(whole)

    def statement(self, sql: str) -> str:
        made = self._statements.get(sql)
        if made is None:
            made = self._statements[sql] = sql.replace("~.", f'"{self.address.schema}".')
        return made

    async def _using(self, run: Callable[[Any], Awaitable[T]]) -> T:
        for last in (False,) * (_TRIES - 1) + (True,):
            pool = self._pool
            if pool is None:
                raise BrokerClosed("the broker is not connected")
            self._running += 1
            try:
                with self.translated():
                    async with pool.acquire(timeout=TIMEOUT) as connection:
                        try:
                            return await run(connection)
                        except asyncpg.InternalClientError:
                            # The server has said that it ends; nothing more can come of this connection.
                            connection.terminate()
                            raise
            except BrokerUnavailable as error:
                # Only what the server has undone for the sake of another.
                if last or getattr(error.__cause__, "sqlstate", None) not in _AGAIN:
                    raise
            finally:
                self._running -= 1
                if not self._running:
                    self._quiet.set()
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the client's errors into ours."""
        try:
            yield
        except asyncpg.PostgresError as error:
            if error.sqlstate == GONE:
                raise Gone from error
            raise _meaning(error, self.address) from error
        except asyncpg.ClientConfigurationError as error:
            raise ConfigurationError(f"{self.address.shown}: {error}") from error
        except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            told = str(error) or type(error).__name__
            raise BrokerUnavailable(f"{self.address.shown} cannot be reached: {told}") from error


async def alone(address: Address, act: Callable[[Link], Awaitable[T]]) -> T:
    """``act(link)`` on a connection of its own, for who is not connected, as what it needs is not there yet."""
    link = Link(address, connections=1)
    await link.open()
    try:
        return await act(link)
    finally:
        await link.close()


async def _keep_as_it_is(connection: Any) -> None:
    """Nothing here leaves anything behind in a session: resetting it would be a round trip for nothing."""


def _meaning(error: asyncpg.PostgresError, address: Address) -> BrokerUnavailable | ConfigurationError:
    state = error.sqlstate or ""
    if state in _MISSING:
        return ConfigurationError(
            f"{address.shown} lacks what this Postroom needs in the schema {address.schema} ({error}); "
            "run postroom migrate for it"
        )
    if state.startswith(_REFUSED):
        return ConfigurationError(f"{address.shown} refuses: {error}")
    if state in _POOLED or (state == "08P01" and "startup parameter" in str(error)):
        # The client's advice, on further lines, is for those who call it themselves.
        said, *_ = str(error).splitlines()
        return ConfigurationError(
            f"{address.shown} is a pooler, it seems ({said}): "
            "put pgbouncer=1 into the URL, or name the server behind it"
        )
    return BrokerUnavailable(f"{address.shown}: {error}")
