"""The consuming processes of a file, as this one sees them."""

from __future__ import annotations

import os
import socket
import sqlite3
from pathlib import Path

from postroom.broker.sqlite import holders, settle

DEATH_CHECK = 0.5
"""Seconds between looks whether another holder has died."""


class Holders:
    """This process's own journal, and the recovery of what dead ones had."""

    def __init__(self, database: Path) -> None:
        self._directory = Path(f"{database}.holders")
        self._journal: holders.Journal | None = None
        self._id = 0
        self._count = 0
        self._files: dict[int, tuple[Path, str]] = {}

    @property
    def journal(self) -> holders.Journal:
        assert self._journal is not None, "register() comes first"
        return self._journal

    def register(self, connection: sqlite3.Connection) -> None:
        """Become known to the others. The lock is held before anybody can look for it."""
        if self._journal is None:
            self._journal = holders.Journal(self._directory)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        row = connection.execute("INSERT INTO holder (file, worker) VALUES (?, ?)", (self._journal.path.name, worker))
        self._id = int(row.lastrowid or 0)

    @property
    def registered(self) -> bool:
        return self._journal is not None

    def unregister(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM holder WHERE id = ?", (self._id,))

    def close(self) -> None:
        """Give up the lock."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def next_lease(self) -> int:
        """A token that no other claim has or ever had."""
        self._count += 1
        return self._id << 32 | self._count

    def dead(self, connection: sqlite3.Connection) -> list[int]:
        """Holders whose process has died. Only reads."""
        known = connection.execute("SELECT id, file, worker FROM holder").fetchall()
        self._files = {number: (self._directory / file, worker) for number, file, worker in known}
        return [number for number, (path, _) in self._files.items() if number != self._id and holders.is_dead(path)]

    def recover(self, connection: sqlite3.Connection, number: int, now: float) -> int:
        """Give back what a dead holder had. Returns how many. Doing it twice does it once."""
        path, worker = self._files[number]
        count = 0
        for seq, lease, started in holders.claims(path):
            count += settle.give_back(connection, now, seq, lease, started=started, worker=worker)
        connection.execute("DELETE FROM holder WHERE id = ?", (number,))
        return count

    def remove_file(self, number: int) -> None:
        """Once the recovery is committed."""
        path, _ = self._files.pop(number)
        holders.remove(path)

    def was_started(self, seq: int, lease: int) -> bool:
        """Whether the holder of an expired lease had started the message; if nothing is known, it counts."""
        path, _ = self._files.get(lease >> 32, (None, ""))
        if lease >> 32 == self._id:
            path = self.journal.path
        for noted_seq, noted_lease, started in holders.claims(path) if path is not None else ():
            if (noted_seq, noted_lease) == (seq, lease):
                return started
        return True

    def worker_of(self, number: int) -> str:
        """``host:pid`` of a holder, as far as it is known."""
        return self._files.get(number, (None, ""))[1]
