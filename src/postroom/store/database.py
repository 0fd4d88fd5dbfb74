"""The user's database as commands and relays open it: by its URL, through SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from postroom.errors import BrokerUnavailable, ConfigurationError

try:
    import sqlalchemy as sa
except ImportError as error:
    raise ConfigurationError("this needs sqlalchemy: pip install 'postroom[outbox]'") from error

__all__ = ["NOW", "connected", "make_engine", "sa"]

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
NOW = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": "unix_timestamp(now(6))",
    "mariadb": "unix_timestamp(now(6))",
}
"""The server's unix time, by SQLAlchemy's name of the database."""


def make_engine(url: str) -> sa.Engine:
    """``url``: ``postgresql://…``, ``mysql://…``, ``sqlite:///…`` or any of SQLAlchemy's; nothing is connected yet.

    Raises ``ConfigurationError``.
    """
    scheme, _, rest = url.partition("://")
    try:
        engine = sa.create_engine(f"{_DRIVERS.get(scheme, scheme)}://{rest}", pool_pre_ping=True)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
        raise ConfigurationError(f"the database's URL: {error}") from error
    if engine.dialect.name not in NOW:
        raise ConfigurationError(f"the database's URL: {engine.dialect.name} is not supported")
    return engine


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A connection in a transaction that commits at the end. Raises ``ConfigurationError`` or ``BrokerUnavailable``."""
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    except sa.exc.DBAPIError as error:
        raise BrokerUnavailable(f"the database: {error.orig}") from error
    finally:
        engine.dispose()
