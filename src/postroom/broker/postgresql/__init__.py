"""The broker in a PostgreSQL database: the queue is rows beside your own, and can share your transactions.

What happens to a message is in ``sql/``: read ``tables.sql`` first, then ``consume.sql``. Every move is one function,
called by one statement, and so happens whole or not at all.
"""

from postroom.broker.postgresql.broker import PostgreSQLBroker

__all__ = ["PostgreSQLBroker"]
