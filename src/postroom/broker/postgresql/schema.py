"""Tables and functions in a schema, and how a database of an older version becomes one of this version."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from postroom.broker.postgresql.address import Address
from postroom.broker.postgresql.link import Link
from postroom.errors import ConfigurationError

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


class Schema(NamedTuple):
    """What is to be in the schema of an address; the table ``version`` there says how much of it is."""

    package: str
    """Where the SQL is, in the folder ``sql``."""
    steps: Sequence[tuple[str, ...]]
    """Files of each version; only ever appended to."""
    command: str
    """What makes it, for people who lack it."""

    @property
    def version(self) -> int:
        """The one that this Postroom needs."""
        return len(self.steps)

    async def check(self, link: Link) -> None:
        """Raises ``ConfigurationError`` unless all is there."""
        there = await self._look(link)
        if there < self.version:
            address = link.address
            found = f"is of version {there}, this Postroom needs {self.version}" if there else "does not exist"
            raise ConfigurationError(
                f"{address.shown}: the schema {address.schema} {found}; see what would be done by {self.command}, do "
                f"it by {self.command} --apply, or put ?migrate=auto into the URL to have it done at every start"
            )

    async def pending(self, link: Link) -> list[str]:
        """What :meth:`migrate` would run. Only reads."""
        return self._plan(link.address, await self._look(link))

    async def migrate(self, link: Link) -> int:
        """Do what is left to be done, all of it or nothing. Returns the number of steps."""

        async def run(connection: Any) -> int:
            # Several processes may start at once: the version is read again once the others are out of the way.
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            known = await connection.fetchval(_EXISTS, link.address.schema)
            sql = link.statement("SELECT coalesce(max(number), 0) FROM ~.version")
            version = int(await connection.fetchval(sql)) if known else 0
            steps = self._plan(link.address, version)
            for step in steps:
                await connection.execute(step)
            return len(steps)

        await self._look(link)
        return await link.transact(run)

    def source(self, name: str) -> str:
        """The SQL of one file."""
        return (files(self.package) / "sql" / f"{name}.sql").read_text("utf-8")

    async def _look(self, link: Link) -> int:
        """The version that is there; 0: nothing. Only reads.

        Raises ``ConfigurationError`` for a server that is too old, or tables that are too new.
        """
        server = int(await link.value("SELECT current_setting('server_version_num')"))
        if server < OLDEST_SERVER:
            raise ConfigurationError(
                f"{link.address.shown} is PostgreSQL {server // 10000}; Postroom needs 13 or newer"
            )
        version = 0
        if await link.value(_EXISTS, link.address.schema):
            version = int(await link.value("SELECT coalesce(max(number), 0) FROM ~.version"))
        if version > self.version:
            raise ConfigurationError(
                f"the schema {link.address.schema} of {link.address.shown} was written by a newer Postroom (version "
                f"{version}, this one knows {self.version}); upgrade Postroom"
            )
        return version

    def _plan(self, address: Address, version: int) -> list[str]:
        """The steps from ``version`` to this one, each as SQL to be run in one transaction."""
        return [
            f"-- Step {number} of {self.version}\n"
            f'CREATE SCHEMA IF NOT EXISTS "{address.schema}";\n'
            f'SET LOCAL search_path = "{address.schema}", pg_temp;\n'
            f"{_VERSION};\n\n" + "\n".join(map(self.source, names)) + f"\nINSERT INTO version VALUES ({number});\n"
            for number, names in enumerate(self.steps[version:], version + 1)
        ]


QUEUES = Schema(
    "postroom.broker.postgresql",
    (("tables", "publish", "unique", "consume", "operate", "settings"),),
    "postroom migrate",
)
"""The broker's own."""
