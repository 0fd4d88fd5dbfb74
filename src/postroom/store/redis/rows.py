"""Records as the server keeps them: read, changed by the rules all stores share, and written if nobody was faster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from postroom.broker.redis.link import Link
from postroom.errors import BrokerUnavailable
from postroom.message import JobRecord
from postroom.store.records import COLUMNS, MEMORY, RUNNING, UNCONFIRMED, WAITING, Record, job_record

PAGE = 500
"""Records of one script: the server does nothing else meanwhile."""
_HEAD = ("confirmed", "copy", "state")
_COLUMNS = tuple(name for name in COLUMNS if name not in ("confirmed", "state"))
HELD_BY = (WAITING, RUNNING, *(4 + _COLUMNS.index(name) for name in ("attempt", "expires_at")))
"""What tells a script whether a record holds its key: states, and places in the rest of it, counted from 1."""
_TRIES = 100


class Place(NamedTuple):
    """Where a record is. An event nobody wanted has an empty subscription."""

    id: str
    sub: str


class Row(msgspec.Struct):
    """A record with what never changes of it."""

    topic: str
    name: str
    created_at: float
    record: Record

    @property
    def forgotten_at(self) -> float | None:
        """When it may be removed; ``None``: not as it is."""
        times = [] if self.record.purge_at is None else [self.record.purge_at + MEMORY]
        if not self.record.confirmed and self.record.state == WAITING:
            times.append(self.created_at + UNCONFIRMED)
        return min(times, default=None)

    def shown(self, place: Place, now: float) -> JobRecord:
        record = self.record
        return job_record(
            (
                *(*place, self.topic, self.name, record.state, record.attempt, record.due, self.created_at),
                *(record.started_at, record.finished_at, record.expires_at, record.progress, record.result),
                record.failures,
            ),
            now,
        )


def fresh(topic: str, name: str, created_at: float, *, due: float, result_ttl: float, **known: Any) -> Row:
    """A record that begins; ``known``: what differs from the beginning of most."""
    values: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "state": WAITING, "attempt": 1, "confirmed": False, "buried": False, "cancel": False, "failures": "[]",
    }  # fmt: skip
    return Row(topic, name, created_at, Record(**(values | {"due": due, "result_ttl": result_ttl} | known)))


def encode(row: Row) -> bytes:
    """See ``scripts/common.lua``."""
    record = row.record
    head = f"{record.confirmed:d}{record.copy is not None:d}{record.state}".encode()
    body = [row.topic, row.name, row.created_at, *(getattr(record, name) for name in _COLUMNS)]
    return mark() + head + msgspec.msgpack.encode(body)


def mark() -> bytes:
    """What tells one writing of a record from all others."""
    return os.urandom(8)


def decode(value: bytes) -> Row:
    topic, name, created_at, *rest = msgspec.msgpack.decode(value[11:])
    record = dict(zip(_COLUMNS, rest, strict=True))
    return Row(topic, name, created_at, Record(state=value[10] - 48, confirmed=value[8] == 49, **record))


def place_of(member: bytes) -> Place:
    """From where it stands in the order of all."""
    sub, _, job_id = member.decode().partition(":")
    return Place(job_id, sub)


def forget_text(row: Row) -> str:
    return "" if row.forgotten_at is None else repr(row.forgotten_at)


class Rows:
    """Many records at once."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def read(self, places: Sequence[Place]) -> dict[Place, Row]:
        """Those that exist."""
        return {place: decode(value) for place, value in (await self._read(places)).items()}

    async def change(self, places: Iterable[Place], decide: Callable[[Place, Row | None], Row | None]) -> None:
        """Each becomes what ``decide(place, row)`` makes of it; ``None``: it stays as it is.

        It is asked again about those that somebody else has changed meanwhile. Raises ``BrokerUnavailable``.
        """
        await self._swap(places, decide, lambda row: encode(row))

    async def tidy(self, places: Sequence[Place], now: float) -> list[Place]:
        """Remove those whose time is over, and look at the others when theirs is. Returns those that are not there."""

        def removed(row: Row) -> bytes:
            return b"" if row.forgotten_at is not None and row.forgotten_at <= now else encode(row)

        seen: set[Place] = set()

        def note(place: Place, row: Row | None) -> Row | None:
            seen.update([place] if row is not None else [])
            return row

        await self._swap(places, note, removed)
        return [place for place in places if place not in seen]

    async def remove(self, places: Iterable[Place]) -> None:
        await self._swap(places, lambda _, row: row, lambda row: b"")

    async def _swap(
        self,
        places: Iterable[Place],
        decide: Callable[[Place, Row | None], Row | None],
        written: Callable[[Row], bytes],
    ) -> None:
        left = sorted(set(places))
        for _ in range(_TRIES):
            if not left:
                return
            found = await self._read(left)
            arguments: list[Any] = []
            chosen: list[Place] = []
            for place in left:
                value = found.get(place)
                row = decide(place, None if value is None else decode(value))
                if row is not None:
                    chosen.append(place)
                    arguments += (*place, value[:8] if value else b"", written(row), forget_text(row))
            told: list[int] = []
            for start in range(0, len(chosen), PAGE):
                page = arguments[start * 5 : (start + PAGE) * 5]
                told += await self._link.run("swap", len(page) // 5, *page)
            left = [place for place, done in zip(chosen, told, strict=True) if not done]
        raise BrokerUnavailable("the store: others change the same records all the time; try again later")

    async def _read(self, places: Sequence[Place]) -> dict[Place, bytes]:
        found: dict[Place, bytes] = {}
        for start in range(0, len(places), PAGE):
            page = places[start : start + PAGE]
            told = await self._link.run("read", len(page), *(part for place in page for part in place))
            found |= {place: value for place, value in zip(page, told, strict=True) if value}
        return found
