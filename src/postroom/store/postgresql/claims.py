"""Rows that change as their messages are delivered and settled; whole batches, each in the open transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from postroom.store.base import Again, Claim, End
from postroom.store.postgresql.session import Session
from postroom.store.records import COLUMNS, Record

# In one order everywhere: two batches with the same rows must not wait for each other.
_FIND = f"""
SELECT seq, id, sub, {", ".join(COLUMNS)} FROM ~.record
WHERE (id, sub) IN (SELECT * FROM unnest($1::text[], $2::text[])) ORDER BY id, sub FOR UPDATE
"""
_SAVE = f"""
UPDATE ~.record SET {", ".join(f"{name} = ${number}" for number, name in enumerate(COLUMNS, 2))} WHERE seq = $1
"""
_FOREIGN = """
INSERT INTO ~.record (id, sub, topic, name, state, due, created_at, expires_at, result_ttl, confirmed)
VALUES ($1, $2, $3, $4, 0, $5, $6, $7, $8, true) ON CONFLICT DO NOTHING
"""

Rows = dict[tuple[str, str], tuple[int, Record]]
"""By id and subscription: a row's number and its record."""


async def deliver(session: Session, now: float, claims: Sequence[Claim]) -> list[End | None]:
    """See ``Store.deliver``."""
    rows = await find(session, (_place(claim) for claim in claims))
    foreign = [claim for claim in claims if _place(claim) not in rows]
    if foreign:
        await session.executemany(_FOREIGN, sorted(map(_foreign_row, foreign), key=lambda row: row[:2]))
        rows |= await find(session, (_place(claim) for claim in foreign))
    uncertain = [
        claim.message.id
        for claim in claims
        if claim.message.idempotency_key is not None and not rows[_place(claim)][1].confirmed
    ]
    if uncertain:
        # Their publishers may have died before they could: the keys must not let another through.
        await session.execute("UPDATE ~.dedup SET confirmed = true WHERE id = ANY($1::text[])", sorted(uncertain))
    ends = [rows[_place(claim)][1].deliver(claim, now) for claim in claims]
    await save(session, rows)
    return ends


async def finish(session: Session, now: float, ends: Sequence[tuple[Claim, End]]) -> list[bool]:
    """See ``Store.finish``."""
    rows = await find(session, (_place(claim) for claim, _ in ends))
    ours = [_place(claim) in rows and rows[_place(claim)][1].finish(claim, end, now) for claim, end in ends]
    await save(session, rows)
    return ours


async def again(session: Session, now: float, claims: Sequence[tuple[Claim, Again]]) -> None:
    """See ``Store.again``."""
    rows = await find(session, (_place(claim) for claim, _ in claims))
    for claim, how in claims:
        if _place(claim) in rows:
            rows[_place(claim)][1].again(claim, how, now)
    await save(session, rows)


async def find(session: Session, places: Iterable[tuple[str, str]]) -> Rows:
    """Those that exist, locked."""
    wanted = sorted(set(places))
    found = await session.fetch(_FIND, [place[0] for place in wanted], [place[1] for place in wanted])
    return {(row[1], row[2]): (row[0], Record(*row[3:])) for row in found}


async def save(session: Session, rows: Rows) -> None:
    await session.executemany(_SAVE, [(seq, *record.values()) for seq, record in rows.values()])


def _place(claim: Claim) -> tuple[str, str]:
    return claim.message.id, claim.subscription


def _foreign_row(claim: Claim) -> tuple[Any, ...]:
    message = claim.message
    due = message.not_before or message.created_at
    bindings = (message.created_at, message.expires_at, message.result_ttl)
    return (message.id, claim.subscription, message.topic, message.name, due, *bindings)
