"""A connection that lives exactly as long as the process: by it the server knows that the process does.

It also carries the notes of what is started. They are in the kernel's hands before the handler runs, from whatever
thread it is noted: a handler that kills its process at once would otherwise be gone before its note, never counted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis import Connection, SSLConnection
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from postroom.broker.redis.link import Link

# Only what is still leased: a late note of a lost lease must leave nothing behind. Sent whole each time, for nobody
# would hear that the server does not know it.
_NOTE = """#!lua flags=allow-oom
for n = 1, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[n]) then redis.call('SADD', KEYS[2], ARGV[n]) end
end
"""
_PATIENCE = 0.25
"""Seconds for which a note waits at most, should the server take in nothing."""
_UNSENT = 1000

Note = tuple[Any, ...]

_lifelines: weakref.WeakSet[Lifeline] = weakref.WeakSet()


class Lifeline:
    """Subscribes to a channel of its own, on which nothing ever comes: scripts ask whether anybody listens there.

    Whoever has died does not, for the system closes its connections; whoever is frozen or short of time does.
    """

    def __init__(self, link: Link) -> None:
        self.process = f"{socket.gethostname()}:{os.getpid()}.{os.urandom(4).hex()}".replace("/", "-")
        """The name of this process on the server."""
        self._link = link
        self._lock = threading.Lock()
        self._connection: Any = None
        self._connecting = asyncio.Lock()
        self._unsent: deque[Note] = deque(maxlen=_UNSENT)
        self._closed = False
        _lifelines.add(self)

    async def connect(self, *, anew: bool = False) -> None:
        """Unless it is connected. Called every second: a connection that has died is seen by that.

        ``anew``: also if it seems to be: the server does not know it, as after a failover to another.
        """
        async with self._connecting:
            with self._lock:
                if anew:
                    self._drop()
                self._send(("PING",))
                if self._connection is not None:
                    return
            options = await self._link.node_options()
            with self._link.translated():
                await asyncio.to_thread(self._open, options)

    @property
    def stands(self) -> bool:
        """Whether it is connected, as far as the system has heard."""
        with self._lock:
            return self._is_up()

    def started(self, leases_key: str, started_key: str, leases: Sequence[str]) -> None:
        """From any thread; does not wait for the server."""
        note = ("EVAL", _NOTE, 2, leases_key, started_key, *leases)
        with self._lock:
            if not self._send(note):
                self._unsent.append(note)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    def after_fork(self) -> None:
        """A forked child would keep it up when the process has died."""
        # Without the lock, which a thread that is not here may hold. Closed here, it stays open there.
        self._drop()

    def _open(self, options: dict[str, Any]) -> None:
        connection = _connect(options, self._link.key("alive", self.process))
        with self._lock:
            if self._closed:
                # Whoever wanted it waits no longer.
                connection.disconnect()
                return
            self._drop()
            self._connection = connection
            # While there was none, notes have waited.
            while self._unsent and self._send(self._unsent[0]):
                self._unsent.popleft()

    def _send(self, command: Note) -> bool:
        # A first write after its end would seem to succeed.
        if not self._is_up():
            return False
        try:
            # Packed in C, as in ``Link``: the client's own packing would cost more than the sending.
            self._connection.send_packed_command([pack_command(command)])
        except (RedisError, OSError):
            self._drop()
            return False
        return True

    def _is_up(self) -> bool:
        if self._connection is None:
            return False
        try:
            # Nothing ever comes but the end.
            self._connection.can_read(0)
        except (RedisError, OSError):
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None


def _connect(options: dict[str, Any], channel: str) -> Any:
    kind: Any = SSLConnection if options.pop("ssl", False) else Connection
    # Only with this protocol may a connection that has subscribed send other commands.
    connection = kind(**options | {"retry": Retry(NoBackoff(), 0), "protocol": 3})
    connection.connect()
    try:
        connection.send_command("SUBSCRIBE", channel)
        connection.read_response(push_request=True)
        connection.send_command("CLIENT", "REPLY", "OFF")
    except BaseException:
        connection.disconnect()
        raise
    # Getting in may take its time; a note may not.
    connection._sock.settimeout(_PATIENCE)
    return connection


def _after_fork_in_child() -> None:
    for lifeline in list(_lifelines):
        lifeline.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
