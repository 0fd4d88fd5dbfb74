"""How each library's connection runs one statement, begins a transaction, and says whether one is open.

Nothing is imported here: a connection is known by its class, so that only libraries in use are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from postroom.errors import ConfigurationError

Database = Literal["sqlite", "postgresql", "mysql"]
Parameters = Sequence[Any]


class Kind(NamedTuple):
    """One library's connections."""

    database: Callable[[Any], str]
    """Which SQL it speaks: ``sqlite``, ``postgresql``, ``mysql`` or ``mariadb``."""
    joins: Callable[[Any], bool]
    """Whether a statement now becomes part of a transaction that the caller will commit."""
    run: Callable[[Any, str, Parameters], Any]
    """Run a statement whose parameters are written ``?``. Returns the number of rows changed, or awaits it."""
    fetch: Callable[[Any, str, Parameters], Any]
    """Run a query. Returns its rows, or awaits them."""
    begin: Callable[[Any], Any]
    """A context manager around a transaction: commits at the end, rolls back if anything was raised."""
    awaited: bool = False


def kind_of(connection: Any) -> Kind:
    """Raises ``ConfigurationError`` for a connection of an unknown library."""
    own = type(connection)
    found = kind_of_type(own)
    if found is None:
        names = ", ".join(sorted(_KINDS))
        raise ConfigurationError(
            f"{own.__module__}.{own.__qualname__} is no database connection known here; give one of: {names}"
        )
    return found


def kind_of_type(own: type) -> Kind | None:
    """The kind of connections of this class; ``None`` for any other class."""
    try:
        return _found[own]
    except KeyError:
        found = next((_KINDS[name] for name in names_of(own) if name in _KINDS), None)
        _found[own] = found
        return found


def names_of(own: type) -> list[str]:
    """A class and its bases, each by the first word of its module and its own name."""
    return [f"{known.__module__.partition('.')[0]}.{known.__qualname__}" for known in own.__mro__]


def database_of(kind: Kind, connection: Any) -> Database:
    """Raises ``ConfigurationError`` for a database whose SQL is not known."""
    name = kind.database(connection)
    if name in ("sqlite", "postgresql"):
        return "sqlite" if name == "sqlite" else "postgresql"
    if name in ("mysql", "mariadb"):
        return "mysql"
    raise ConfigurationError(f"this works with SQLite, PostgreSQL, MySQL and MariaDB, not with {name}")


@lru_cache(maxsize=256)
def _numbered(sql: str) -> str:
    """``$1, $2 …``, as asyncpg writes parameters."""
    head, *rest = sql.split("?")
    return head + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))


def _formatted(sql: str) -> str:
    return sql.replace("?", "%s")


# By what a driver says of itself (PEP 249, ``paramstyle``; ``numeric_dollar`` is SQLAlchemy's name for asyncpg's).
_WRITTEN: dict[str, Callable[[str], str]] = {
    "qmark": str,
    "format": _formatted,
    "pyformat": _formatted,
    "numeric_dollar": _numbered,
}


@contextmanager
def _sqlite_begin(connection: Any) -> Iterator[None]:
    # In words rather than by the modules' own means, which differ with their versions and modes. At once for
    # writing: a reader that becomes a writer later can be refused without a wait.
    if not connection.in_transaction:
        connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _sqlite3_joins(connection: Any) -> bool:
    # Python 3.12 has ``autocommit`` too; -1 is the old way, in which a change opens a transaction by itself.
    alone = getattr(connection, "autocommit", -1) is True or connection.isolation_level is None
    return bool(connection.in_transaction or not alone)


def _sqlite3_run(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(connection.execute(sql, parameters).rowcount)


def _apsw_run(connection: Any, sql: str, parameters: Parameters) -> int:
    before = connection.total_changes()
    connection.execute(sql, tuple(parameters))
    return int(connection.total_changes() - before)


def _sqlite_fetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(connection.execute(sql, tuple(parameters)))


def _psycopg_joins(connection: Any) -> bool:
    # 0 is PQTRANS_IDLE (libpq): in autocommit mode the statement would be a transaction of its own.
    return not connection.autocommit or int(connection.info.transaction_status) != 0


def _psycopg_run(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(connection.execute(_formatted(sql), parameters).rowcount)


async def _psycopg_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    return int((await connection.execute(_formatted(sql), parameters)).rowcount)


def _psycopg_fetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(connection.execute(_formatted(sql), parameters).fetchall())


async def _psycopg_afetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(await (await connection.execute(_formatted(sql), parameters)).fetchall())


def _psycopg_begin(connection: Any) -> Any:
    return connection.transaction()


async def _asyncpg_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    # The status, as ``INSERT 0 1``, ends with the number of rows.
    count = (await connection.execute(_numbered(sql), *parameters)).rpartition(" ")[2]
    return int(count) if count.isdigit() else 0


async def _asyncpg_fetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(await connection.fetch(_numbered(sql), *parameters))


def _alchemy_database(connection: Any) -> str:
    bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
    return str(bound.dialect.name)


def _alchemy_joins(connection: Any) -> bool:
    bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
    options = bound.get_execution_options() if hasattr(bound, "get_execution_options") else {}
    levels = (options.get("isolation_level"), getattr(bound.dialect, "_on_connect_isolation_level", None))
    return "AUTOCOMMIT" not in levels


def _alchemy_execute(connection: Any, sql: str, parameters: Parameters) -> Any:
    # As the driver takes it: to have it compiled by SQLAlchemy takes as long as to run it.
    inner = connection.connection() if hasattr(connection, "get_bind") else connection
    written = _WRITTEN[inner.dialect.loaded_dbapi.paramstyle](sql)
    return inner.exec_driver_sql(written, tuple(parameters))


def _alchemy_run(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(_alchemy_execute(connection, sql, parameters).rowcount)


async def _alchemy_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(await connection.run_sync(_alchemy_run, sql, parameters))


def _alchemy_fetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(_alchemy_execute(connection, sql, parameters).fetchall())


async def _alchemy_afetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    return list(await connection.run_sync(_alchemy_fetch, sql, parameters))


def _alchemy_begin(connection: Any) -> Any:
    return connection.begin()


def _django_run(connection: Any, sql: str, parameters: Parameters) -> int:
    with connection.cursor() as cursor:
        cursor.execute(_formatted(sql), list(parameters))
        return int(cursor.rowcount)


def _django_fetch(connection: Any, sql: str, parameters: Parameters) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(_formatted(sql), list(parameters))
        return list(cursor.fetchall())


def _django_begin(connection: Any) -> Any:
    from django.db import transaction

    return transaction.atomic(using=connection.alias)


def _always(name: str) -> Callable[[Any], str]:
    return lambda connection: name


def _sqlite(joins: Callable[[Any], bool], run: Callable[[Any, str, Parameters], int]) -> Kind:
    return Kind(_always("sqlite"), joins, run, _sqlite_fetch, _sqlite_begin)


_PSYCOPG = Kind(_always("postgresql"), _psycopg_joins, _psycopg_run, _psycopg_fetch, _psycopg_begin)
_PSYCOPG_ASYNC = Kind(
    _always("postgresql"), _psycopg_joins, _psycopg_arun, _psycopg_afetch, _psycopg_begin, awaited=True
)
_ASYNCPG = Kind(
    _always("postgresql"),
    lambda connection: bool(connection.is_in_transaction()),
    _asyncpg_arun,
    _asyncpg_fetch,
    lambda connection: connection.transaction(),
    awaited=True,
)
_ALCHEMY = Kind(_alchemy_database, _alchemy_joins, _alchemy_run, _alchemy_fetch, _alchemy_begin)
_ALCHEMY_ASYNC = Kind(_alchemy_database, _alchemy_joins, _alchemy_arun, _alchemy_afetch, _alchemy_begin, awaited=True)
_DJANGO = Kind(
    lambda connection: str(connection.vendor),
    lambda connection: bool(connection.in_atomic_block or not connection.get_autocommit()),
    _django_run,
    _django_fetch,
    _django_begin,
)

_KINDS: dict[str, Kind] = {
    "sqlite3.Connection": _sqlite(_sqlite3_joins, _sqlite3_run),
    "apsw.Connection": _sqlite(lambda connection: bool(connection.in_transaction), _apsw_run),
    "psycopg.Connection": _PSYCOPG,
    "psycopg.AsyncConnection": _PSYCOPG_ASYNC,
    "asyncpg.Connection": _ASYNCPG,
    "asyncpg.PoolConnectionProxy": _ASYNCPG,
    "sqlalchemy.Connection": _ALCHEMY,
    "sqlalchemy.Session": _ALCHEMY,
    "sqlalchemy.AsyncConnection": _ALCHEMY_ASYNC,
    "sqlalchemy.AsyncSession": _ALCHEMY_ASYNC,
    "django.BaseDatabaseWrapper": _DJANGO,
    "django.ConnectionProxy": _DJANGO,
}
"""By the first word of the module and the name of the class."""
# Looked up once a class: a handler that only commits one update would notice.
_found: dict[type, Kind | None] = {}
