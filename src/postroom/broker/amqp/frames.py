"""Deliveries read off the wire straight away.

A worker's cost on RabbitMQ is mostly that of taking deliveries apart: three frames each, and a table of headers. pika
makes an object of every frame and looks up callbacks for each. Here the frames of a delivery on a channel that takes
them go directly to who wants them; all others go pika's way. AMQP 0-9-1, 2.3.5 "Frame details", 4.2.5.5 "Field tables".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from struct import Struct, error
from typing import Any

import pika  # type: ignore[import-untyped]
from pika import exceptions, frame
from pika.adapters.asyncio_connection import AsyncioConnection  # type: ignore[import-untyped]
from pika.channel import Channel  # type: ignore[import-untyped]

logger = logging.getLogger("postroom.broker.amqp")

_FRAME = Struct(">BHI")
_LONG = Struct(">Q")
_SIGNED = Struct(">q")
_INTEGER = Struct(">i")
_SIZE = Struct(">I")
_FLAGS = Struct(">H")
_METHOD, _HEADER, _BODY = 1, 2, 3
_DELIVER = b"\x00\x3c\x00\x3c"

_CONTENT_TYPE, _ENCODING, _HEADERS, _MODE = 1 << 15, 1 << 14, 1 << 13, 1 << 12
_PRIORITY, _CORRELATION, _REPLY, _EXPIRATION = 1 << 11, 1 << 10, 1 << 9, 1 << 8
_ID, _TIMESTAMP, _TYPE = 1 << 7, 1 << 6, 1 << 5
_UNUSUAL = _ENCODING | _PRIORITY | _CORRELATION | _REPLY | _EXPIRATION | 0x1F

Arrived = Callable[[str, int, bool, str, str, Any, bytes], object]
"""Told of a delivery: the consumer's tag, its own, whether it was handed over before, the exchange, the routing key,
the properties, the body."""


class _Channel(Channel):  # type: ignore[misc]
    """A channel of pika whose consumers end with it, not before it."""

    def close(self, reply_code: int = 0, reply_text: str = "Normal shutdown") -> None:
        # pika would cancel them first. The server then makes another one the single active consumer, and hands it
        # younger messages while those before them are still held by this channel: a key would lose its order.
        self._consumers.clear()
        super().close(reply_code, reply_text)


class Connection(AsyncioConnection):  # type: ignore[misc]
    """A connection of pika, some of whose channels take their deliveries themselves."""

    _frame_buffer: bytes
    bytes_received: int

    def take(self, channel: int, arrived: Arrived) -> None:
        """From now on deliveries of that channel go to ``arrived``; those that pika has begun to read, it ends."""
        self._takers()[channel] = _Taker(arrived)
        # pika reads 4 KiB at a time, as it copies what is left after every frame; here nothing is copied.
        self._transport._MAX_RECV_BYTES = 65_536

    def _takers(self) -> dict[int, _Taker]:
        if not hasattr(self, "_by_channel"):
            self._by_channel: dict[int, _Taker] = {}
        return self._by_channel

    def _on_data_available(self, data_in: bytes) -> None:
        takers = self._takers()
        if not takers:
            super()._on_data_available(data_in)
            return
        buffer: bytes = self._frame_buffer + data_in if self._frame_buffer else data_in
        start, end = 0, len(buffer)
        while end - start >= 8:
            kind, channel, size = _FRAME.unpack_from(buffer, start)
            stop = start + 8 + size
            if stop > end:
                break
            taker = takers.get(channel)
            if taker is not None and taker.takes(kind, buffer, start + 7, stop - 1):
                self.frames_received += 1
            else:
                self._process_frame(frame.decode_frame(buffer[start:stop])[1])
            start = stop
        self._frame_buffer = buffer[start:]
        # By these pika knows that the connection lives.
        self.bytes_received += start

    def _create_channel(self, channel_number: int, on_open_callback: Any) -> _Channel:
        return _Channel(self, channel_number, on_open_callback)

    def _on_channel_cleanup(self, channel: Any) -> None:
        # The number is given to another channel later.
        self._takers().pop(channel.channel_number, None)
        super()._on_channel_cleanup(channel)


class Properties:
    """Of the properties of a message those that we read."""

    __slots__ = ("headers", "message_id", "timestamp", "type")

    def __init__(self, data: bytes) -> None:
        (flags,) = _FLAGS.unpack_from(data)
        if flags & _UNUSUAL or not self._read(data, flags):
            others = _read_by_pika(data)
            self.headers: dict[str, Any] | None = others.headers
            self.message_id: str | bytes | None = others.message_id
            self.timestamp: int | None = others.timestamp
            self.type: str | bytes | None = others.type

    def _read(self, data: bytes, flags: int) -> bool:
        """False: there is something in it that is left to pika."""
        self.headers = self.message_id = self.timestamp = self.type = None
        at = 2
        if flags & _CONTENT_TYPE:
            at += 1 + data[at]
        if flags & _HEADERS:
            (size,) = _SIZE.unpack_from(data, at)
            self.headers = _table(data, at + 4, at + 4 + size)
            if self.headers is None:
                return False
            at += 4 + size
        if flags & _MODE:
            at += 1
        if flags & _ID:
            self.message_id = text_of(data[at + 1 : at + 1 + data[at]])
            at += 1 + data[at]
        if flags & _TIMESTAMP:
            (self.timestamp,) = _LONG.unpack_from(data, at)
            at += 8
        if flags & _TYPE:
            self.type = text_of(data[at + 1 : at + 1 + data[at]])
        return True


def _read_by_pika(data: bytes) -> Any:
    properties = pika.BasicProperties()
    try:
        properties.decode(data)
    except (exceptions.AMQPError, OSError, OverflowError, ValueError, error) as failure:
        # A time of the year 70,000, say. The connection must not break, for here as with whoever gets it next.
        logger.warning("properties of a message cannot be read, only its body: %r", failure)
        return pika.BasicProperties()
    return properties


def text_of(data: bytes | str) -> str:
    """Every client may write what it likes: what is no UTF-8 is told as ``\\xfc``."""
    return data if isinstance(data, str) else data.decode(errors="backslashreplace")


_NAMES = {
    name.encode(): name
    for name in ("postroom", *(f"cloudEvents_{attribute}" for attribute in ("specversion", "id", "source", "type")))
}
"""Of the headers that nearly every message has: a look is cheaper than a decoding."""


def _table(data: bytes, at: int, end: int) -> dict[str, Any] | None:
    """Texts and whole numbers; ``None`` if there is another kind of value."""
    table: dict[str, Any] = {}
    while at < end:
        stop = at + 1 + data[at]
        raw = data[at + 1 : stop]
        name = _NAMES.get(raw) or text_of(raw)
        kind = data[stop]
        at = stop + 1
        if kind == 0x53:  # S: a text
            (size,) = _SIZE.unpack_from(data, at)
            at += 4
            try:
                table[name] = data[at : at + size].decode()
            except UnicodeDecodeError:
                table[name] = data[at : at + size]
            at += size
        elif kind == 0x6C:  # l: 64 bits
            (table[name],) = _SIGNED.unpack_from(data, at)
            at += 8
        elif kind == 0x49:  # I: 32 bits
            (table[name],) = _INTEGER.unpack_from(data, at)
            at += 4
        else:
            return None
    return table


class _Taker:
    """Puts together the frames of one delivery: method, header, and as many of the body as it has."""

    __slots__ = ("_arrived", "_left", "_method", "_parts", "_properties")

    def __init__(self, arrived: Arrived) -> None:
        self._arrived = arrived
        self._method: tuple[str, int, bool, str, str] | None = None
        self._properties = b""
        self._left = 0
        self._parts: list[bytes] = []

    def takes(self, kind: int, buffer: bytes, at: int, stop: int) -> bool:
        """Whether the frame, whose payload stands there, belongs to a delivery that began here."""
        if kind == _METHOD:
            if buffer[at : at + 4] != _DELIVER:
                return False
            self._method = _deliver(buffer, at + 4)
            return True
        if self._method is None:
            return False
        if kind == _HEADER:
            (self._left,) = _LONG.unpack_from(buffer, at + 4)
            self._properties = buffer[at + 12 : stop]
        elif kind == _BODY:
            self._parts.append(buffer[at:stop])
            self._left -= stop - at
        else:
            return False
        if not self._left:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            method, self._method, self._parts = self._method, None, []
            self._arrived(*method, Properties(self._properties), body)
        return True


def _deliver(buffer: bytes, at: int) -> tuple[str, int, bool, str, str]:
    stop = at + 1 + buffer[at]
    consumer = buffer[at + 1 : stop].decode()
    (tag,) = _LONG.unpack_from(buffer, stop)
    is_redelivery = buffer[stop + 8] == 1
    at = stop + 9
    stop = at + 1 + buffer[at]
    exchange = buffer[at + 1 : stop].decode()
    return consumer, tag, is_redelivery, exchange, text_of(buffer[stop + 1 : stop + 1 + buffer[stop]])
