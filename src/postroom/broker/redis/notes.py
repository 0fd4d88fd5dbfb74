"""Notes of what is started: they are in the kernel's hands before the handler runs, from whatever thread it is noted.

A handler that kills its process at once would otherwise be gone before its note; and then it would never be counted.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

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


class Notes:
    """A connection that only sends. While there is none, notes wait for the next."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._connection: Any = None
        self._connecting = asyncio.Lock()
        self._unsent: deque[Note] = deque(maxlen=_UNSENT)

    async def connect(self) -> None:
        """Unless it is connected. Called every second: a connection that has died is seen by that."""
        async with self._connecting:
            with self._lock:
                self._send(("PING",))
                if self._connection is not None:
                    return
            options = await self._link.node_options()
            with self._link.translated():
                connection = await asyncio.to_thread(_connect, options)
            with self._lock:
                self._connection = connection
                while self._unsent and self._send(self._unsent[0]):
                    self._unsent.popleft()

    def started(self, leases_key: str, started_key: str, leases: Sequence[str]) -> None:
        """From any thread; does not wait for the server."""
        note = ("EVAL", _NOTE, 2, leases_key, started_key, *leases)
        with self._lock:
            if not self._send(note):
                self._unsent.append(note)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _send(self, command: Note) -> bool:
        connection = self._connection
        if connection is None:
            return False
        try:
            # Nothing ever comes but the end of the connection; a first write after it would seem to succeed.
            connection.can_read(0)
            connection.send_command(*command)
        except (RedisError, OSError):
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None


def _connect(options: dict[str, Any]) -> Any:
    kind: Any = SSLConnection if options.pop("ssl", False) else Connection
    connection = kind(**options | {"retry": Retry(NoBackoff(), 0), "socket_timeout": _PATIENCE})
    connection.connect()
    connection.send_command("CLIENT", "REPLY", "OFF")
    return connection
