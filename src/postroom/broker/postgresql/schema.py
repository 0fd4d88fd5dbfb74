"""The tables and functions, and how a database of an older version becomes one of this version."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from postroom.broker.postgresql.address import Address
from postroom.broker.postgresql.link import Link
from postroom.errors import ConfigurationError

STEPS: Sequence[tuple[str, ...]] = (("tables", "publish", "unique", "consume", "operate", "settings"),)
"""Files of each version; only ever appended to."""
OLDEST_SERVER = 130000
"""``server_version_num`` of PostgreSQL 13."""

_LOCK = 0x506F5374
"""``PoSt``: the advisory lock that one process holds while it creates or migrates."""
_VERSION = "CREATE TABLE IF NOT EXISTS version (number integer PRIMARY KEY, since timestamptz NOT NULL DEFAULT now())"
# Looked up in the catalogue itself: by name, a session that has just waited for another may be told from its cache.
_EXISTS = """
SELECT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'version'
)
"""


class State(NamedTuple):
    """What is there."""

    version: int
    """0: nothing."""
    server: int
    """As ``server_version_num``."""


@cache
def source(name: str) -> str:
    return (files("postroom.broker.postgresql") / "sql" / f"{name}.sql").read_text("utf-8")


async def look(link: Link) -> State:
    """Only reads. Raises ``ConfigurationError`` for a server that is too old, or tables that are too new."""
    server = int(await link.value("SELECT current_setting('server_version_num')"))
    if server < OLDEST_SERVER:
        raise ConfigurationError(f"{link.address.shown} is PostgreSQL {server // 10000}; Postroom needs 13 or newer")
    version = 0
    if await link.value(_EXISTS, link.address.schema):
        version = int(await link.value("SELECT coalesce(max(number), 0) FROM ~.version"))
    if version > len(STEPS):
        raise ConfigurationError(
            f"the schema {link.address.schema} of {link.address.shown} was written by a newer Postroom (version "
            f"{version}, this one knows {len(STEPS)}); upgrade Postroom"
        )
    return State(version, server)


async def check(link: Link) -> None:
    """Raises ``ConfigurationError`` unless all is there."""
    state = await look(link)
    if state.version < len(STEPS):
        address = link.address
        found = (
            f"is of version {state.version}, this Postroom needs {len(STEPS)}" if state.version else "does not exist"
        )
        raise ConfigurationError(
            f"{address.shown}: the schema {address.schema} {found}; see what would be done by postroom migrate, do it "
            "by postroom migrate --apply, or put ?migrate=auto into the URL to have it done at every start"
        )


async def pending(link: Link) -> list[str]:
    """What :func:`migrate` would run. Only reads."""
    return plan(link.address, (await look(link)).version)


def plan(address: Address, version: int) -> list[str]:
    """The steps from ``version`` to this one, each as SQL to be run in one transaction."""
    return [
        f"-- Step {number} of {len(STEPS)}\n"
        f'CREATE SCHEMA IF NOT EXISTS "{address.schema}";\n'
        f'SET LOCAL search_path = "{address.schema}", pg_temp;\n'
        f"{_VERSION};\n\n" + "\n".join(source(name) for name in names) + f"\nINSERT INTO version VALUES ({number});\n"
        for number, names in enumerate(STEPS[version:], version + 1)
    ]


async def migrate(link: Link) -> int:
    """Do what is left to be done, all of it or nothing. Returns the number of steps."""

    async def run(connection: Any) -> int:
        # Several processes may start at once: the version is read again once the others are out of the way.
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        known = await connection.fetchval(_EXISTS, link.address.schema)
        sql = link.statement("SELECT coalesce(max(number), 0) FROM ~.version")
        version = int(await connection.fetchval(sql)) if known else 0
        steps = plan(link.address, version)
        for step in steps:
            await connection.execute(step)
        return len(steps)

    await look(link)
    return await link.transact(run)
