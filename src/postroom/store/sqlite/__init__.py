"""Records in a SQLite file of their own: for workers of one machine, beside whichever broker."""

from postroom.store.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
