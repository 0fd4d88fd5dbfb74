"""The connection, and group commit: what is asked for in one turn of the loop is one transaction."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from postroom.errors import BrokerClosed, BrokerUnavailable, ConfigurationError, PostroomError

T = TypeVar("T")

BUSY_WAIT = 0.0005
"""Seconds between attempts at the write lock: short and even, so that two busy processes share it well."""
BUSY_DEADLINE = 30.0
"""Seconds after which a write lock that others hold is reported."""
_WAL_PAGES = 4000


class Operation:
    """A piece of a transaction and the future its caller waits for."""

    __slots__ = ("done", "future", "run", "undo")

    def __init__(
        self,
        run: Callable[[sqlite3.Connection], Any],
        undo: Callable[[], None] | None,
        done: Callable[[Any], None] | None,
        future: asyncio.Future[Any],
    ) -> None:
        self.run = run
        self.undo = undo
        self.done = done
        self.future = future


class Engine:
    """Owns the one connection of a broker; used on one loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = 0
        """Transactions committed: each is one sync of the disk."""
        self._connection: sqlite3.Connection | None = None
        self._waiting: list[Operation] = []
        self._scheduled = False
        self._busy: asyncio.Task[None] | None = None

    def open(self, check: Callable[[sqlite3.Connection], None], prepare: Callable[[sqlite3.Connection], None]) -> None:
        """Open or create the file: ``check`` sees it as it is, before anything in it is changed.

        Raises ``BrokerUnavailable`` or ``ConfigurationError``.
        """
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"the directory {self.path.parent} does not exist; create it, or change the URL")
        with self.translated():
            connection = sqlite3.connect(
                self.path, timeout=BUSY_DEADLINE, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            try:
                check(connection)
                self._configure(connection)
                prepare(connection)
                connection.execute("PRAGMA busy_timeout = 0")
            except BaseException:
                connection.close()
                raise
            self._connection = connection

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def connection(self) -> sqlite3.Connection:
        """For reading, outside of transactions. Raises ``BrokerClosed``."""
        if self._connection is None:
            raise BrokerClosed("the broker is not connected")
        return self._connection

    async def write(
        self,
        run: Callable[[sqlite3.Connection], T],
        *,
        undo: Callable[[], None] | None = None,
        done: Callable[[T], None] | None = None,
    ) -> T:
        """Run ``run(connection)`` in the next transaction, together with whatever else is asked for now.

        It returns after the commit. ``run`` may be run again if another's part of the transaction fails;
        ``undo`` is called if what it did was rolled back, ``done(value)`` right after the commit, before
        any task can interfere. Raises ``BrokerUnavailable`` if nothing was stored.
        """
        future: asyncio.Future[T] = self.begin(run, undo=undo, done=done)
        return await future

    def begin(
        self,
        run: Callable[[sqlite3.Connection], T],
        *,
        undo: Callable[[], None] | None = None,
        done: Callable[[T], None] | None = None,
    ) -> asyncio.Future[T]:
        """:meth:`write` without waiting."""
        if self._connection is None:
            raise BrokerClosed("the broker is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append(Operation(run, undo, done, future))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return future

    async def close(self) -> None:
        """Finish what is under way, then close the connection."""
        while self._waiting or self._busy is not None:
            self._flush()
            if self._busy is not None:
                await asyncio.wait([self._busy])
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn SQLite's errors into Postroom's."""
        try:
            yield
        except sqlite3.Error as error:
            raise translate(error, self.path) from error

    def _configure(self, connection: sqlite3.Connection) -> None:
        # Before the first table exists, or it has no effect.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        (mode,) = connection.execute("PRAGMA journal_mode = wal").fetchone()
        if mode != "wal":
            raise ConfigurationError(
                f"{self.path}: cannot use a write-ahead log here (journal mode {mode}); use a local disk"
            )
        connection.execute("PRAGMA synchronous = FULL")
        # On macOS a sync ends in the drive's cache unless asked for in full; elsewhere this changes nothing.
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        connection.execute("PRAGMA cache_size = -16000")

    def _flush(self) -> None:
        self._scheduled = False
        if not self._waiting or self._busy is not None:
            return None
        try:
            self.connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                return self._fail(self._take(), translate(error, self.path))
            self._busy = asyncio.get_running_loop().create_task(self._wait_for_lock())
        except sqlite3.Error as error:
            self._fail(self._take(), translate(error, self.path))
        else:
            self._transact(self._take())
        return None

    async def _wait_for_lock(self) -> None:
        deadline = asyncio.get_running_loop().time() + BUSY_DEADLINE
        try:
            while True:
                await asyncio.sleep(BUSY_WAIT)
                try:
                    self.connection.execute("BEGIN IMMEDIATE")
                except sqlite3.Error as error:
                    if not is_busy(error) or asyncio.get_running_loop().time() > deadline:
                        return self._fail(self._take(), translate(error, self.path))
                else:
                    return self._transact(self._take())
        finally:
            self._busy = None
            if self._waiting:
                self._flush()

    def _take(self) -> list[Operation]:
        operations, self._waiting = self._waiting, []
        return operations

    def _transact(self, operations: list[Operation]) -> None:
        """Run all within the open transaction; one that fails is left out, and the others run again."""
        connection = self.connection
        while True:
            values: list[Any] = []
            try:
                for operation in operations:
                    values.append(operation.run(connection))  # noqa: PERF401 -- how far it came is needed if one fails
            except Exception as error:
                failed = operations.pop(len(values))
                _undo([*operations, failed])
                try:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    self._fail([failed], translate(error, self.path) if isinstance(error, sqlite3.Error) else error)
                    if not operations:
                        return None
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.Error as again:
                    return self._fail(operations, translate(again, self.path))
                continue
            return self._commit(operations, values)

    def _commit(self, operations: list[Operation], values: list[Any]) -> None:
        connection = self.connection
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            _undo(operations)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return self._fail(operations, translate(error, self.path))
        self.commits += 1
        for operation, value in zip(operations, values, strict=True):
            try:
                if operation.done is not None:
                    operation.done(value)
            except Exception as error:
                # The others of this transaction must be answered all the same.
                self._fail([operation], error)
            if not operation.future.done():
                operation.future.set_result(value)
        return None

    @staticmethod
    def _fail(operations: list[Operation], error: Exception) -> None:
        for operation in operations:
            if not operation.future.done():
                operation.future.set_exception(error)


def _undo(operations: list[Operation]) -> None:
    for operation in operations:
        if operation.undo is not None:
            operation.undo()


def is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    """The primary result code, https://www.sqlite.org/rescode.html; 0 if SQLite did not say."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def translate(error: sqlite3.Error, path: Path) -> PostroomError:
    """What an error of SQLite means for whoever runs Postroom."""
    code = _code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(f"{path} is not a SQLite database; give Postroom a file of its own")
    if code == sqlite3.SQLITE_CANTOPEN and path.exists() and not os.access(path, os.R_OK | os.W_OK):
        code = sqlite3.SQLITE_READONLY
    told = _TOLD.get(code, "{path}: {name}: {error}")
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return BrokerUnavailable(told.format(path=path, error=error, name=name, seconds=BUSY_DEADLINE))


_TOLD = {
    sqlite3.SQLITE_BUSY: "{path} has been locked by another process for {seconds:.0f} s",
    sqlite3.SQLITE_LOCKED: "{path} has been locked by another process for {seconds:.0f} s",
    sqlite3.SQLITE_FULL: "the disk with {path} is full; nothing was stored: make room, then try again",
    sqlite3.SQLITE_READONLY: "{path} or its directory cannot be written to; check owner, permissions and mount",
    sqlite3.SQLITE_PERM: "{path} or its directory cannot be written to; check owner, permissions and mount",
    sqlite3.SQLITE_CORRUPT: "{path} is damaged ({error}); restore a copy, or save the rest by sqlite3's .recover",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened or created ({error})",
    sqlite3.SQLITE_IOERR: "{path}: the disk reports an error ({name}); nothing was stored",
}
