"""Records in PostgreSQL: for workers of many machines, beside whichever broker."""

from postroom.store.postgresql.store import PostgreSQLStore

__all__ = ["PostgreSQLStore"]
