"""What wakes a relay when somebody has committed: a hint only, for it also looks from time to time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from postroom.errors import BrokerUnavailable
from postroom.store.database import sa
from postroom.store.outbox import TABLE

POLL = 0.02
"""Seconds between looks at the version of a SQLite file; one takes microseconds."""
LOOK = 0.2
"""Seconds between looks into an outbox that cannot ring."""
LISTENING = 1.0
"""The same where a notification says when to look; some poolers of connections lose them."""


class Bell:
    """Made for one engine, used by one thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.PoolProxiedConnection | None = None
        self._seen: Any = None

    def listen(self) -> None:
        """From now on nothing is missed. Raises ``BrokerUnavailable``."""
        if self._connection is None:
            with self._translated():
                self._connect()

    def wait(self, stop: threading.Event) -> None:
        """Until somebody has committed, or for a while. Raises ``BrokerUnavailable``."""
        with self._translated():
            self._wait(stop)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Not back to the pool: it still listens.
            connection.invalidate()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.DBAPIError, self._engine.dialect.loaded_dbapi.Error) as error:
            self.close()
            raise BrokerUnavailable(f"the outbox's database: {error}") from error

    def _connect(self) -> None:
        if self._engine.dialect.name == "sqlite":
            self._connection = self._engine.raw_connection()
            self._seen = self._version()
        elif self._engine.dialect.driver == "psycopg":
            self._connection = self._engine.raw_connection()
            self._driver.set_autocommit(True)
            self._driver.execute(f"LISTEN {TABLE}")

    def _wait(self, stop: threading.Event) -> None:
        if self._connection is None:
            stop.wait(LOOK)
        elif self._engine.dialect.name == "sqlite":
            deadline = time.monotonic() + LISTENING
            while self._version() == self._seen and time.monotonic() < deadline and not stop.wait(POLL):
                pass
            self._seen = self._version()
        else:
            for _ in self._driver.notifies(timeout=LISTENING, stop_after=1):
                pass

    @property
    def _driver(self) -> Any:
        assert self._connection is not None
        return self._connection.driver_connection

    def _version(self) -> int:
        """Changes with every commit of another connection (``PRAGMA data_version``)."""
        return int(self._driver.execute("PRAGMA data_version").fetchone()[0])
