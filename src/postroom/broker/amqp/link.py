"""A connection that opens when it is needed, and channels whose calls can be awaited.

pika calls back; here its callbacks become futures. Nothing is repeated silently: a lost connection fails all that
waits, and whoever asks for a channel next opens a new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import pika  # type: ignore[import-untyped]
from pika import exceptions
from pika.adapters.utils import connection_workflow  # type: ignore[import-untyped]

from postroom.broker.amqp.address import Address
from postroom.broker.amqp.frames import Arrived, Connection
from postroom.errors import BrokerClosed, BrokerError, BrokerUnavailable, ConfigurationError

CONNECT_PATIENCE = 10.0
"""Seconds to reach one node and to agree with it."""
CLOSE_PATIENCE = 3.0
"""Seconds for the server's goodbye."""
CALL_PATIENCE = 30.0
"""Seconds for an answer; a server that is alive but silent for so long is taken for unreachable."""
BLOCKED_PATIENCE = 5.0
"""Seconds to wait while the server takes nothing because memory or disk run out (rabbitmq.com/docs/alarms)."""

ACCESS_REFUSED = 403
NOT_FOUND = 404
LOCKED = 405
PRECONDITION_FAILED = 406

# pika tells at length of every connection that could not be made; the error that leaves here tells it once.
logging.getLogger("pika").setLevel(logging.CRITICAL)


class Link:
    """One connection. Constructed without I/O; lives on one event loop."""

    def __init__(self, address: Address, purpose: str) -> None:
        self.address = address
        self._purpose = purpose
        self._connection: Any = None
        self._opening = asyncio.Lock()
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._closed = False
        self._gone: asyncio.Future[None] | None = None
        self.server: dict[str, Any] = {}
        """What the server has told of itself: ``version``, ``product``, ``capabilities``; empty before it was there."""

    async def channel(self) -> Channel:
        """A new channel. Raises ``BrokerUnavailable`` or ``ConfigurationError``."""
        connection = await self._opened()
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            raw = connection.channel(on_open_callback=lambda _: fulfil(opened, None))
        except exceptions.AMQPError as error:
            raise translated(error, self.address) from error
        channel = Channel(raw, self.address)
        channel.fails(opened)
        try:
            await answered(opened)
        except asyncio.CancelledError:
            # Nobody will close it; and a connection has room for no more than some two thousand.
            if not (channel.raw.is_closing or channel.raw.is_closed):
                channel.raw.close()
            raise
        return channel

    @property
    def is_blocked(self) -> bool:
        """Whether the server has told that it takes no messages."""
        return not self._unblocked.is_set()

    async def unblocked(self) -> None:
        """Wait until the server takes messages. Raises ``BrokerUnavailable`` after ``BLOCKED_PATIENCE``."""
        if not self._unblocked.is_set():
            try:
                async with asyncio.timeout(BLOCKED_PATIENCE):
                    await self._unblocked.wait()
            except TimeoutError as error:
                raise BrokerUnavailable(
                    f"{self.address!r} takes no messages: it is short of memory or disk; "
                    "see `rabbitmq-diagnostics alarms`"
                ) from error

    async def close(self) -> None:
        self._closed = True
        async with self._opening:
            connection, gone = self._connection, self._gone
        if connection is None or gone is None:
            return
        if connection.is_open:
            connection.close()
        for _ in range(2):
            try:
                async with asyncio.timeout(CLOSE_PATIENCE):
                    await asyncio.shield(gone)
                    return
            except TimeoutError:
                # A server short of memory does not read that it is to close.
                connection._terminate_stream(exceptions.ConnectionOpenAborted("it did not answer the goodbye"))

    async def _opened(self) -> Any:
        async with self._opening:
            if self._closed:
                raise BrokerClosed("the broker was closed; make a new one")
            if self._connection is None or not self._connection.is_open:
                self._connection = await self._connect()
                self.server = self._connection.server_properties
            return self._connection

    async def _connect(self) -> Any:
        context = self.address.tls_context()
        failure: BrokerError | ConfigurationError | None = None
        for host, port in self.address.hosts:
            try:
                return await self._connect_to(host, port, context)
            except BrokerUnavailable as error:
                failure = error
        assert failure is not None
        raise failure

    async def _connect_to(self, host: str, port: int, context: Any) -> Any:
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Any] = loop.create_future()
        gone: asyncio.Future[None] = loop.create_future()

        def failed(_: Any, error: Exception) -> None:
            if not opened.done():
                opened.set_exception(translated(error, self.address))
                opened.exception()

        def closed(_: Any, error: Exception) -> None:
            failed(_, error)
            self._unblocked.set()
            fulfil(gone, None)

        connection = Connection(
            self._parameters(host, port, context),
            on_open_callback=lambda connection: fulfil(opened, connection),
            on_open_error_callback=failed,
            on_close_callback=closed,
        )
        connection.add_on_connection_blocked_callback(lambda *_: self._unblocked.clear())
        connection.add_on_connection_unblocked_callback(lambda *_: self._unblocked.set())
        self._gone = gone
        try:
            return await opened
        except asyncio.CancelledError:
            # Nobody will have it; as it is not open yet, it cannot be closed yet either.
            if connection.is_open:
                connection.close()
            else:
                connection.add_on_open_callback(lambda connection: connection.close())
            raise

    def _parameters(self, host: str, port: int, context: Any) -> Any:
        address = self.address
        return pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=address.vhost,
            credentials=pika.PlainCredentials(address.user, address.password),
            heartbeat=address.heartbeat,
            ssl_options=None if context is None else pika.SSLOptions(context, host),
            connection_attempts=1,
            socket_timeout=CONNECT_PATIENCE,
            stack_timeout=CONNECT_PATIENCE,
            client_properties={"connection_name": f"postroom {self._purpose} {os.getpid()}"},
        )


class Channel:
    """One channel. The server closes it for whatever it refuses, so what may be refused gets a channel of its own."""

    def __init__(self, raw: Any, address: Address) -> None:
        self.raw = raw
        self.address = address
        self.reason: Exception | None = None
        """Why it is closed; ``None`` while it is open."""
        self._waiting: set[asyncio.Future[Any]] = set()
        self._when_closed: list[Callable[[Exception], object]] = []
        self._getting: asyncio.Future[Any] | None = None
        raw.add_on_close_callback(self._on_close)
        raw.add_callback(lambda _: self._got(None), [pika.spec.Basic.GetEmpty], one_shot=False)

    def when_closed(self, told: Callable[[Exception], object]) -> None:
        self._when_closed.append(told)

    def fails(self, future: asyncio.Future[Any]) -> None:
        """``future`` fails if the channel is closed before it is done."""
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of pika's channel and wait for the server's answer.

        Raises ``Refused`` if the server closes the channel for it, ``BrokerUnavailable`` if the connection is lost.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._check()
        self.fails(answer)
        try:
            getattr(self.raw, method)(**arguments, callback=lambda value: fulfil(answer, value))
        except exceptions.AMQPError as error:
            raise translated(error, self.address) from error
        return await answered(answer)

    async def get(self, queue: str) -> tuple[Any, Any, bytes] | None:
        """The next message as (method, properties, body), unsettled; ``None`` if there is none."""
        self._check()
        self._getting = asyncio.get_running_loop().create_future()
        self.fails(self._getting)
        self.raw.basic_get(queue, lambda _, *found: self._got(found))
        found: tuple[Any, Any, bytes] | None = await answered(self._getting)
        return found

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Settle; effective once a later call is answered. Raises ``BrokerUnavailable``."""
        self._check()
        self.raw.basic_ack(tag, multiple)

    def take(self, arrived: Arrived) -> None:
        """Let all deliveries on this channel go to ``arrived``."""
        self.raw.connection.take(self.raw.channel_number, arrived)

    def cancel(self, tags: Sequence[str]) -> None:
        """Let the server hand over nothing more to these consumers. What is on its way still arrives.

        pika's own ``basic_cancel`` would give that back, and the server would count it as tried.
        """
        if not tags:
            return
        for tag in tags:
            self.raw._send_method(pika.spec.Basic.Cancel(consumer_tag=tag, nowait=True))
        # Once the server has answered what comes after, nothing more is on its way.
        self.raw.basic_qos(callback=lambda _: [self.raw._consumers.pop(tag, None) for tag in tags])

    async def close(self) -> None:
        """What it holds unsettled goes back to its queues."""
        if self.reason is not None or not self.raw.is_open:
            return
        closed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._when_closed.append(lambda _: fulfil(closed, None))
        self.raw.close()
        await answered(closed)

    def _got(self, found: tuple[Any, ...] | None) -> None:
        if self._getting is not None:
            fulfil(self._getting, found)

    def _check(self) -> None:
        if self.reason is not None:
            raise translated(self.reason, self.address)

    def _on_close(self, _: Any, reason: Exception) -> None:
        self.reason = reason
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(translated(reason, self.address))
                future.exception()
        for told in self._when_closed:
            told(reason)


class Refused(BrokerUnavailable):
    """The server has refused a call and closed its channel: what it will never do, or what is not there now."""

    def __init__(self, code: int, text: str, address: Address) -> None:
        self.code = code
        self.told = f"{text} ({code})"
        # The same code is for what another client has for itself.
        is_forbidden = code == ACCESS_REFUSED and "for user" in text
        needed = f"; a user needs configure, write and read: {address.permit}" if is_forbidden else ""
        super().__init__(f"{self.told}{needed}")


def fulfil(future: asyncio.Future[Any], value: Any) -> None:
    """Set the result, unless nobody waits for it any more."""
    if not future.done():
        future.set_result(value)


async def answered(future: asyncio.Future[Any]) -> Any:
    try:
        async with asyncio.timeout(CALL_PATIENCE):
            return await future
    except TimeoutError as error:
        raise BrokerUnavailable(f"RabbitMQ has not answered for {CALL_PATIENCE:.0f} s") from error


def translated(error: BaseException, address: Address) -> BrokerError | ConfigurationError:
    """pika's error as ours, with itself as the cause."""
    made = _translated(error, address)
    made.__cause__ = error
    return made


def _translated(error: BaseException, address: Address) -> BrokerError | ConfigurationError:
    if isinstance(error, connection_workflow.AMQPConnectionWorkflowFailed):
        return _translated(error.exceptions[-1], address)
    if isinstance(error, connection_workflow.AMQPConnectorPhaseErrorBase):
        return _translated(error.exception, address)
    if isinstance(error, exceptions.ProbableAuthenticationError) and "ACCESS_REFUSED" in str(error):
        return ConfigurationError(f"{address!r} refuses this user and password")
    if isinstance(error, exceptions.ProbableAccessDeniedError) and _is_final(str(error)):
        if "not found" in str(error):
            return ConfigurationError(f"{address!r}: there is no virtual host {address.vhost!r}")
        return ConfigurationError(f"{address!r}: this user may not enter the virtual host: {address.permit}")
    if isinstance(error, exceptions.AMQPConnectionError) and error.args and isinstance(error.args[0], Exception):
        return _translated(error.args[0], address)
    if isinstance(error, exceptions.ChannelClosedByBroker):
        return Refused(error.reply_code, error.reply_text, address)
    if isinstance(error, exceptions.ChannelClosedByClient | exceptions.ConnectionClosedByClient):
        return BrokerClosed("the broker was closed; make a new one")
    return BrokerUnavailable(f"{address!r} cannot be reached: {str(error) or type(error).__name__}")


def _is_final(refusal: str) -> bool:
    """pika takes every connection that ends in this phase for one that was not allowed, also one that was cut; and the
    server refuses with the same code for a while: a virtual host that still starts, or has all the connections it may.
    """
    return "NOT_ALLOWED" in refusal and "is down" not in refusal and "is reached" not in refusal
