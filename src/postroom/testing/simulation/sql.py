"""Each statement is a step at which the process may die, before it or after it, or the disk may fail."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from postroom.testing.simulation.machine import Died

if TYPE_CHECKING:
    from postroom.testing.simulation.machine import Machine, Process

_STATEMENT_TIME = 300e-6
_COMMIT_TIME = 0.004
_SHOWN = 100


class Connection(sqlite3.Connection):
    """A connection of a simulated process."""

    machine: Machine
    process: Process | None = None
    is_open = True

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        self._before(sql)
        cursor = super().execute(sql, parameters)
        self._after(sql)
        return cursor

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        self._before(sql)
        cursor = super().executemany(sql, parameters)
        self._after(sql)
        return cursor

    def commit(self) -> None:
        if self.in_transaction:
            self._before("COMMIT")
            super().commit()
            self._after("COMMIT")

    def abandon(self) -> None:
        """As the system does when the process is gone."""
        # A statement that somebody still refers to would keep a closed connection's transaction, and its lock.
        if self.is_open and self.in_transaction:
            super().rollback()
        self.close()

    def close(self) -> None:
        self.is_open = False
        super().close()

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or Cursor)

    def _before(self, sql: str) -> None:
        process = self.process
        if process is None or not process.mortal:
            return
        if process.dead:
            raise Died
        self.machine.faults.before_statement(process, sql)

    def _after(self, sql: str) -> None:
        process, machine = self.process, self.machine
        machine.io_happened = True
        machine.spend(_COMMIT_TIME if sql == "COMMIT" else _STATEMENT_TIME)
        if process is None:
            return
        if machine.trace.detailed:
            machine.note(process, f"sql {' '.join(sql.split())[:_SHOWN]}")
        if process.mortal:
            machine.faults.after_statement(process, sql)


class Cursor(sqlite3.Cursor):
    """As of libraries that use cursors, such as SQLAlchemy."""

    connection: Connection

    def execute(self, sql: str, parameters: Any = (), /) -> Cursor:
        self.connection._before(sql)
        super().execute(sql, parameters)
        self.connection._after(sql)
        return self

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Cursor:
        self.connection._before(sql)
        super().executemany(sql, parameters)
        self.connection._after(sql)
        return self
