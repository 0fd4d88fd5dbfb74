"""What the statements of one transaction run on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from postroom.broker.postgresql.link import Link


class Session:
    """A connection of ``link`` with an open transaction. In SQL ``~.`` stands for the schema."""

    def __init__(self, link: Link, connection: Any) -> None:
        self._sql = link.statement
        self._connection = connection

    async def execute(self, sql: str, *values: Any) -> None:
        await self._connection.execute(self._sql(sql), *values)

    async def executemany(self, sql: str, rows: Iterable[Any]) -> None:
        await self._connection.executemany(self._sql(sql), rows)

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        found: list[Any] = await self._connection.fetch(self._sql(sql), *values)
        return found

    async def row(self, sql: str, *values: Any) -> Any:
        """The first row; ``None`` if there is none."""
        return await self._connection.fetchrow(self._sql(sql), *values)

    async def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row; ``None`` if there is none."""
        return await self._connection.fetchval(self._sql(sql), *values)
