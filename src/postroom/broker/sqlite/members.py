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

    def register(self, connection: sqlite3.Connection) -> int:
        """Become known to the others, with the lock held. Returns the number to join as."""
        if self._journal is None:
            self._journal = holders.Journal(self._directory)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        row = connection.execute("INSERT INTO holder (file, worker) VALUES (?, ?)", (self._journal.path.name, worker))
        return int(row.lastrowid or 0)

    def join(self, number: int) -> None:
        """The registration is committed. Before, another process might get the same number, and the same leases."""
        self._id = number

    @property
    def registered(self) -> bool:
        return self._id != 0

    def unregister(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM holder WHERE id = ?", (self._id,))

    def close(self, *, keep_notes: bool) -> None:
        """Give up the lock. ``keep_notes`` leaves what is still held to whoever finds the lock free."""
        if self._journal is not None:
            self._journal.close(keep=keep_notes)
            self._journal = None
        self._id = 0

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

    def notes_of(self, number: int) -> dict[tuple[int, int], bool]:
        """What a holder has noted: whether it had started (seq, lease); empty if nothing is known of it."""
        path, _ = self._files.get(number, (None, ""))
        if number == self._id:
            path = self.journal.path
        return {} if path is None else {(seq, lease): started for seq, lease, started in holders.claims(path)}

    def worker_of(self, number: int) -> str:
        """``host:pid`` of a holder, as far as it is known."""
        return self._files.get(number, (None, ""))[1]
