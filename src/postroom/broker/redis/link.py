"""The connection to the server: runs scripts, and turns the client's errors into ours. It never retries by itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from hiredis import pack_command
from redis.asyncio import BlockingConnectionPool, Connection, Redis, RedisCluster, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from postroom.broker.redis.address import FILES, Address
from postroom.clock import Clock
from postroom.errors import BrokerClosed, BrokerError, BrokerUnavailable, ConfigurationError

BLOCK = 2.0
"""Seconds for which a blocking command waits."""
TIMEOUT = 5.0
"""Seconds without an answer after which the connection counts as lost. Well above ``BLOCK``."""
_CONNECTIONS = 32
"""Commands under way at once; more wait for their turn."""
_NEEDS_ROOM = ("admit", "declare", "publish", "replay")
_CANNOT_WRITE = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED", "TRYAGAIN", "MOVED", "ASK", "BUSY ")


class Stale(Exception):
    """The topology is not what the caller thinks; nothing was done."""


class Gone(Exception):
    """The subscription is not declared; nothing was done."""


class Script(NamedTuple):
    source: str
    sha: str


@cache
def script(package: str, name: str) -> Script:
    """A script with what all of its package have in common."""
    folder = files(package) / "scripts"
    common, own = ((folder / f"{part}.lua").read_text("utf-8") for part in ("common", name))
    # Consuming goes on when memory is full, for it is what makes room; only producers are refused.
    flags = "" if name in _NEEDS_ROOM else " flags=allow-oom"
    source = f"#!lua{flags}\n{common}{own}"
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


class _Packed:
    """Commands are packed in C: the client's own packing, in Python, would cost more than all else that we do here.

    Not in a cluster: its client makes the connections itself.
    """

    def pack_command(self, *arguments: Any) -> list[bytes]:
        # A name of two words, as CONFIG GET, is two arguments.
        return [pack_command((*arguments[0].split(), *arguments[1:]))]


class _Plain(_Packed, Connection):
    pass


class _Secure(_Packed, SSLConnection):
    pass


async def end(task: asyncio.Task[None]) -> None:
    """Cancel it until it ends: the client loses a cancellation that comes while it connects."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


class Link:
    """Opened by ``open``, not by the constructor."""

    def __init__(
        self, address: Address, clock: Clock | None, *, package: str = "postroom.broker.redis", area: str = ""
    ) -> None:
        """``clock``: whose time the scripts use; ``None``: the server's. ``package``: where they are.

        ``area``: how the keys begin behind the namespace.
        """
        self.address = address
        self._package = package
        self._root = address.root + area
        self._clock = clock
        self._client: Any = None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closed = False

    def options(self) -> dict[str, Any]:
        """What every connection is made with."""
        address = self.address
        return {
            "host": address.host,
            "port": address.port,
            "username": address.username,
            "password": address.password,
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "protocol": 2,
            **({} if address.cluster else {"db": address.database}),
            **address.tls,
        }

    @property
    def connected(self) -> bool:
        return self._client is not None and not self.closed

    async def open(self) -> None:
        """Raises ``BrokerUnavailable`` or ``ConfigurationError``."""
        if self._client is not None:
            return
        for option in FILES & self.address.tls.keys():
            if not os.access(self.address.tls[option], os.R_OK):
                raise ConfigurationError(f"{self.address.shown}: cannot read {self.address.tls[option]}")
        client = self.new_client(_CONNECTIONS)
        try:
            with self.translated():
                await client.ping()
        except BaseException:
            await client.aclose()
            raise
        self._client = client

    async def close(self) -> None:
        """Lets what is under way come to its end, and refuses what comes later."""
        self.closed = True
        await self._idle.wait()
        if self._client is not None:
            await self._client.aclose()

    def new_client(self, connections: int) -> Any:
        """A client of so many connections at most. The client's own retries would publish twice."""
        options = self.options() | {"retry": Retry(NoBackoff(), 0)}
        if self.address.cluster:
            return RedisCluster(**options | {"max_connections": connections})
        options["connection_class"] = _Secure if options.pop("ssl", False) else _Plain
        return Redis.from_pool(BlockingConnectionPool(max_connections=connections, timeout=TIMEOUT, **options))

    async def node_options(self) -> dict[str, Any]:
        """For a connection of one's own to the server that holds the namespace."""
        options = self.options()
        if self.address.cluster:
            with self.using() as client:
                await client.initialize()
                node = client.get_node_from_key(self.key("topology"))
            options |= {"host": node.host, "port": node.port}
        return options

    @contextmanager
    def using(self) -> Iterator[Any]:
        """The client, for single commands."""
        if self.closed:
            raise BrokerClosed("the broker was closed; make a new one")
        if self._client is None:
            raise BrokerClosed("the broker is not connected; await connect() first")
        self._under_way += 1
        self._idle.clear()
        try:
            with self.translated():
                yield self._client
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._idle.set()

    def key(self, *parts: str) -> str:
        return self._root + ":".join(parts)

    async def run(self, name: str, *arguments: Any, version: str = "") -> Any:
        """Run a script. ``version``: of the topology its arguments were made for. Raises ``Stale`` and ``Gone``."""
        wanted = script(self._package, name)
        now = "" if self._clock is None else repr(self._clock.now())
        # The second key never exists. While a cluster moves the keys to another node, one by one, it refuses a script
        # that names a key which is not there; it would break off one that only comes upon such a key, half done.
        given = (2, self.key("topology"), self.key("nothing"), now, version, *arguments)
        with self.using() as client:
            try:
                return await client.evalsha(wanted.sha, *given)
            except NoScriptError:
                # The server was restarted, or another took its place. It has done nothing yet.
                return await client.eval(wanted.source, *given)
            except ReadOnlyError:
                # It is no master any more. Its name may lead to the new one, but open connections would never learn.
                if not self.address.cluster:
                    await client.connection_pool.disconnect(inuse_connections=False)
                raise

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Only our own errors leave."""
        where = self.address.shown
        try:
            yield
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigurationError(f"{where} refuses us: {error}; check user, password and ACL") from error
        except OutOfMemoryError as error:
            raise BrokerUnavailable(f"{where} is full (maxmemory) and takes no messages; {error}") from error
        except (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, ClusterDownError, OSError) as error:
            hint = "; it may not speak TLS there" if self.address.tls and isinstance(error, TimeoutError) else ""
            raise BrokerUnavailable(f"{where} cannot be reached or cannot write now: {_text(error)}{hint}") from error
        except ResponseError as error:
            raise _translated(error, where) from error
        except (ClusterError, RedisClusterException, RedisError) as error:
            if "Cluster mode is not enabled" in str(error):
                raise ConfigurationError(f"{where} is in no cluster: remove cluster=yes from the URL") from error
            raise BrokerUnavailable(f"{where}: {_text(error)}") from error


def _translated(error: ResponseError, where: str) -> Exception:
    text = str(error)
    if text.startswith("STALE"):
        return Stale()
    if text.startswith("GONE"):
        return Gone()
    if text.startswith("ACL failure in script") or "executing the script can't" in text:
        return ConfigurationError(f"{where} refuses us: {text}; check the ACL of the user")
    if "WRONGPASS" in text or "NOAUTH" in text or "invalid DB index" in text or "DB index is out of range" in text:
        return ConfigurationError(f"{where} refuses us: {text}")
    if "compiling script" in text:
        return ConfigurationError(f"{where} is too old: Postroom needs Redis 7.0 or newer, or Valkey")
    if text.startswith("OOM") or "maxmemory" in text:
        return BrokerUnavailable(f"{where} is full (maxmemory) and takes no messages: {text}")
    if text.startswith(_CANNOT_WRITE):
        return BrokerUnavailable(f"{where} cannot write now: {text}")
    return BrokerError(f"{where} answered: {text}")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
