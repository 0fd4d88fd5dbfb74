"""How each library's connection runs one statement, and how it says whether a transaction is open.

Nothing is imported here: a connection is known by its class, so that only libraries in use are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    awaited: bool = False


def kind_of(connection: Any) -> Kind:
    """Raises ``ConfigurationError`` for a connection of an unknown library."""
    for known in type(connection).__mro__:
        found = _KINDS.get(f"{known.__module__.partition('.')[0]}.{known.__qualname__}")
        if found is not None:
            return found
    own = type(connection)
    names = ", ".join(sorted(_KINDS))
    raise ConfigurationError(
        f"{own.__module__}.{own.__qualname__} is no database connection known here; give one of: {names}"
    )


def database_of(kind: Kind, connection: Any) -> Database:
    """Raises ``ConfigurationError`` for a database whose SQL is not known."""
    name = kind.database(connection)
    if name in ("sqlite", "postgresql"):
        return "sqlite" if name == "sqlite" else "postgresql"
    if name in ("mysql", "mariadb"):
        return "mysql"
    raise ConfigurationError(f"this works with SQLite, PostgreSQL, MySQL and MariaDB, not with {name}")


def _numbered(sql: str) -> str:
    """``$1, $2 …``, as asyncpg writes parameters."""
    head, *rest = sql.split("?")
    return head + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))


def _named(sql: str, parameters: Parameters) -> tuple[Any, dict[str, Any]]:
    """``:p1, :p2 …``, as SQLAlchemy writes parameters."""
    from sqlalchemy import text

    head, *rest = sql.split("?")
    named = head + "".join(f":p{number}{part}" for number, part in enumerate(rest, 1))
    return text(named), {f"p{number}": value for number, value in enumerate(parameters, 1)}


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


def _psycopg_joins(connection: Any) -> bool:
    # 0 is PQTRANS_IDLE (libpq): in autocommit mode the statement would be a transaction of its own.
    return not connection.autocommit or int(connection.info.transaction_status) != 0


def _psycopg_run(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(connection.execute(sql.replace("?", "%s"), parameters).rowcount)


async def _psycopg_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    return int((await connection.execute(sql.replace("?", "%s"), parameters)).rowcount)


async def _asyncpg_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    # The status, as ``INSERT 0 1``, ends with the number of rows.
    count = (await connection.execute(_numbered(sql), *parameters)).rpartition(" ")[2]
    return int(count) if count.isdigit() else 0


def _alchemy_database(connection: Any) -> str:
    bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
    return str(bound.dialect.name)


def _alchemy_joins(connection: Any) -> bool:
    bound = connection.get_bind() if hasattr(connection, "get_bind") else connection
    options = bound.get_execution_options() if hasattr(bound, "get_execution_options") else {}
    levels = (options.get("isolation_level"), getattr(bound.dialect, "_on_connect_isolation_level", None))
    return "AUTOCOMMIT" not in levels


def _alchemy_run(connection: Any, sql: str, parameters: Parameters) -> int:
    return int(connection.execute(*_named(sql, parameters)).rowcount)


async def _alchemy_arun(connection: Any, sql: str, parameters: Parameters) -> int:
    return int((await connection.execute(*_named(sql, parameters))).rowcount)


def _django_run(connection: Any, sql: str, parameters: Parameters) -> int:
    with connection.cursor() as cursor:
        cursor.execute(sql.replace("?", "%s"), list(parameters))
        return int(cursor.rowcount)


def _always(name: str) -> Callable[[Any], str]:
    return lambda connection: name


_PSYCOPG = Kind(_always("postgresql"), _psycopg_joins, _psycopg_run)
_ASYNCPG = Kind(_always("postgresql"), lambda c: bool(c.is_in_transaction()), _asyncpg_arun, awaited=True)
_ALCHEMY = Kind(_alchemy_database, _alchemy_joins, _alchemy_run)
_ALCHEMY_ASYNC = Kind(_alchemy_database, _alchemy_joins, _alchemy_arun, awaited=True)
_DJANGO = Kind(lambda c: str(c.vendor), lambda c: bool(c.in_atomic_block or not c.get_autocommit()), _django_run)

_KINDS: dict[str, Kind] = {
    "sqlite3.Connection": Kind(_always("sqlite"), _sqlite3_joins, _sqlite3_run),
    "apsw.Connection": Kind(_always("sqlite"), lambda c: bool(c.in_transaction), _apsw_run),
    "psycopg.Connection": _PSYCOPG,
    "psycopg.AsyncConnection": Kind(_always("postgresql"), _psycopg_joins, _psycopg_arun, awaited=True),
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
