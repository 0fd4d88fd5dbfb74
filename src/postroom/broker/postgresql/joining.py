"""Publishing inside a transaction of the user's own connection to the same database, by whichever library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from postroom.broker.postgresql import rows
from postroom.broker.postgresql.address import Address, Place, same_host
from postroom.broker.postgresql.publish import Answers, read, split
from postroom.errors import ConfigurationError
from postroom.message import Message
from postroom.store.inbox.connections import Kind, kind_of, kind_of_type, names_of

# What the libraries make of JSON differs; text is text.
_PUBLISH = "SELECT CAST(answers AS text) FROM {}.publish(CAST(? AS json), true, CAST(? AS float8), CAST(? AS float8))"


def joins(connection: Any, address: Address) -> bool:
    """Whether ``connection`` is to that database: it has its name, and one of its hosts and ports. No round trip."""
    kind = kind_of_type(type(connection))
    if kind is None or kind.database(connection) != "postgresql":
        return False
    place = _place_of(connection)
    return place.database == address.place.database and bool(place.hosts & address.place.hosts)


def publish_in(
    connection: Any, address: Address, messages: Sequence[Message], moment: float | None, told: float
) -> Answers:
    """Raises ``ConfigurationError`` unless ``connection`` is plain, to that database, and in a transaction."""
    kind = _kind(connection, address)
    if kind.awaited:
        raise ConfigurationError("transaction=: this connection is asynchronous; use the method that begins with a")
    fit, answered = split(messages)
    if not fit:
        return answered([])
    try:
        found = kind.fetch(connection, _sql(address), (rows.batch(fit), moment, told))
    except Exception as error:  # Every library has errors of its own; callers know theirs, and try again by them.
        if _is_missing(error, address):
            raise _missing(address) from error
        raise
    return answered(read(fit, found[0][0]))


async def apublish_in(
    connection: Any, address: Address, messages: Sequence[Message], moment: float | None, told: float
) -> Answers:
    """:func:`publish_in` for connections of either sort."""
    kind = _kind(connection, address)
    if not kind.awaited:
        return publish_in(connection, address, messages, moment, told)
    fit, answered = split(messages)
    if not fit:
        return answered([])
    try:
        found = await kind.fetch(connection, _sql(address), (rows.batch(fit), moment, told))
    except Exception as error:  # Every library has errors of its own; callers know theirs, and try again by them.
        if _is_missing(error, address):
            raise _missing(address) from error
        raise
    return answered(read(fit, found[0][0]))


def _sql(address: Address) -> str:
    return _PUBLISH.format(f'"{address.schema}"')


def _kind(connection: Any, address: Address) -> Kind:
    kind = kind_of(connection)
    if not joins(connection, address):
        raise ConfigurationError(f"transaction=: the connection is not to the broker's database, {address.shown}")
    if not kind.joins(connection):
        raise ConfigurationError(
            "transaction=: no transaction is open, and this connection commits each statement by itself; begin one "
            "first, so that the message and your changes commit together"
        )
    return kind


def _is_missing(error: Exception, address: Address) -> bool:
    return address.schema in str(error) and "does not exist" in str(error)


def _missing(address: Address) -> ConfigurationError:
    return ConfigurationError(
        f"transaction=: the database lacks the schema {address.schema} of this Postroom; run postroom migrate"
    )


def _place_of(connection: Any) -> Place:
    for name in names_of(type(connection)):
        if name in _PLACES:
            host, port, database = _PLACES[name](connection)
            return Place(frozenset({(same_host(host or ""), int(port or 5432))}), database or "")
    raise ConfigurationError(f"transaction=: {type(connection).__qualname__} does not tell its database")


Where = tuple[str | None, int | str | None, str | None]
"""Host, port and database, as far as the library knows."""


def _psycopg(connection: Any) -> Where:
    return connection.info.host, connection.info.port, connection.info.dbname


def _asyncpg(connection: Any) -> Where:
    # It tells this nowhere else. A proxy of a pool hands on what it is asked for.
    address = connection._addr
    host, port = address if isinstance(address, tuple) else (address, address.rpartition(".")[2])
    return host, port, connection._params.database


def _alchemy(connection: Any) -> Where:
    bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
    url = bound.engine.url
    host = url.host or url.query.get("host")
    return host, url.port or url.query.get("port"), url.database


def _django(connection: Any) -> Where:
    settings = connection.settings_dict
    return settings["HOST"], settings["PORT"], settings["NAME"]


_PLACES: dict[str, Callable[[Any], Where]] = {
    "psycopg.Connection": _psycopg,
    "psycopg.AsyncConnection": _psycopg,
    "asyncpg.Connection": _asyncpg,
    "asyncpg.PoolConnectionProxy": _asyncpg,
    "sqlalchemy.Connection": _alchemy,
    "sqlalchemy.Session": _alchemy,
    "sqlalchemy.AsyncConnection": _alchemy,
    "sqlalchemy.AsyncSession": _alchemy,
    "django.BaseDatabaseWrapper": _django,
    "django.ConnectionProxy": _django,
}
