"""One consumer of one subscription."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from postroom.broker.base import Ack, Consumer, Delivery, Outcome, Release
from postroom.broker.refusals import check_count, consumer_closed, lease_over, settled_before
from postroom.broker.sqlite import claim, rows, settle
from postroom.errors import SettlementError

if TYPE_CHECKING:
    from postroom.broker.sqlite.broker import SQLiteBroker

logger = logging.getLogger("postroom.broker")

_LOOK_AGAIN = 0.5
"""Seconds after which a waiting consumer looks anyhow: no wake-up is so sure that a message may depend on it."""


class Receipt:
    """The row and the lease of a delivery, and its slot in the journal."""

    __slots__ = ("line", "lost", "seq_lease", "settled", "slot")

    def __init__(self, seq_lease: settle.Claim, slot: int, line: str | None) -> None:
        self.seq_lease = seq_lease
        self.slot = slot
        self.line = line
        self.settled = False
        self.lost = False


class SQLiteConsumer(Consumer):
    """Made by ``SQLiteBroker.consume``."""

    def __init__(self, broker: SQLiteBroker, name: str, sub: int, lease: float) -> None:
        self._broker = broker
        self._name = name
        self._sub = sub
        self._lease = lease
        self._claimer = claim.Claimer(sub, broker.holders.notes_of, broker.holders.worker_of)
        self._held: dict[Delivery, None] = {}
        self._suspect: Delivery | None = None
        self._wake = asyncio.Event()
        self.waiting = 0
        self._closed = False

    def wake(self) -> None:
        """Something may have become ready."""
        self._wake.set()

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        check_count(max_messages)
        broker = self._broker
        deadline = None if timeout is None else broker.now() + timeout
        while True:
            self._check_open()
            self._wake.clear()
            now = broker.now()
            with broker.engine.translated():
                connection = broker.engine.connection
                ready = self._claimer.is_any(connection, now, suspect=self._may_have_suspect(connection))
            if ready:
                deliveries = await self._claim(max_messages)
                if deliveries:
                    return deliveries
                # What was ready has expired, or another process was quicker: look again, but let others run.
                await asyncio.sleep(0)
                if deadline is None or broker.now() < deadline:
                    continue
            if deadline is not None and broker.now() >= deadline:
                return []
            await self._wait(now, deadline)

    def started(self, deliveries: Sequence[Delivery]) -> None:
        journal = self._broker.holders.journal
        for delivery in deliveries:
            if not delivery.receipt.settled and not delivery.receipt.lost:
                journal.start(delivery.receipt.slot)

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        self._check_open()
        errors: list[SettlementError | None] = []
        todo: list[tuple[Delivery, Outcome]] = []
        for delivery, outcome in settlements:
            receipt: Receipt = delivery.receipt
            error = _refusal(delivery) if receipt.settled or receipt.lost else None
            errors.append(error)
            if error is None:
                receipt.settled = True
                todo.append((delivery, outcome))
        if todo:
            try:
                settled = await self._perform(todo)
            except BaseException:
                for delivery, _ in todo:
                    # Unless the transaction went through, it may be settled again.
                    delivery.receipt.settled = delivery not in self._held
                raise
            verdicts = iter(settled)
            errors = [next(verdicts) if error is None else error for error in errors]
        return errors

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        self._check_open()
        held = [delivery for delivery in deliveries if not delivery.receipt.settled and not delivery.receipt.lost]

        def run(connection: sqlite3.Connection) -> list[bool]:
            until = self._broker.now() + self._lease
            return settle.extend(connection, until, [delivery.receipt.seq_lease for delivery in held])

        kept = await self._broker.engine.write(run) if held else []
        for delivery, still in zip(held, kept, strict=True):
            if not still:
                self._forget(delivery, lost=True)
        return [delivery for delivery in deliveries if delivery.receipt.lost]

    async def close(self) -> None:
        if self._closed:
            return
        held = [(delivery, Release()) for delivery in self._held if not delivery.receipt.settled]
        if held:
            await self.settle(held)
        self._closed = True
        self._wake.set()
        self._broker.forget(self)

    def drop(self) -> None:
        """The connection is gone; nothing can be settled any more."""
        self._closed = True
        self._wake.set()

    async def _claim(self, limit: int) -> list[Delivery]:
        broker = self._broker
        journal = broker.holders.journal
        lease = broker.holders.next_lease()
        slots: list[int] = []
        claimed: list[Delivery] = []
        cancelled = False

        def run(connection: sqlite3.Connection) -> list[claim.Row]:
            if cancelled or self._closed:
                return []
            now = broker.now()
            found = self._claimer.claim(connection, now, now + self._lease, lease, limit, self._may_have_suspect)
            # In the journal before the commit: a claim nobody knows of would wait for its lease.
            slots.extend(journal.note(row[claim.SEQ], lease) for row in found)
            return found

        def undo() -> None:
            for slot in slots:
                journal.clear(slot)
            slots.clear()

        def done(found: list[claim.Row]) -> None:
            claimed.extend(self._delivery(row, lease, slot) for row, slot in zip(found, slots, strict=True))

        try:
            await broker.engine.write(run, undo=undo, done=done)
        except asyncio.CancelledError:
            cancelled = True
            if claimed:
                given_back = broker.engine.begin(
                    lambda connection: self._settle_rows(connection, [(d, Release()) for d in claimed]),
                    done=lambda verdicts: self._after(claimed, verdicts, ready=True),
                )
                given_back.add_done_callback(_left_to_the_lease)
            raise
        return claimed

    def _may_have_suspect(self, connection: sqlite3.Connection) -> bool:
        """One whose lease has passed to others is held no longer, whether this consumer was told so or not."""
        return self._suspect is None or not settle.is_held(connection, self._suspect.receipt.seq_lease)

    def _delivery(self, row: claim.Row, lease: int, slot: int) -> Delivery:
        delivery = Delivery(
            message=rows.message(row[claim.MESSAGE :]),
            subscription=self._name,
            attempt=row[claim.FAILURES] + 1,
            suspect=bool(row[claim.SUSPECT]),
            receipt=Receipt((row[claim.SEQ], lease), slot, row[claim.LINE]),
        )
        self._held[delivery] = None
        if delivery.suspect:
            self._suspect = delivery
        return delivery

    async def _perform(self, todo: list[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        ready = any(not isinstance(outcome, Ack) or delivery.receipt.line is not None for delivery, outcome in todo)
        verdicts = await self._broker.engine.write(
            lambda connection: self._settle_rows(connection, todo),
            done=lambda settled: self._after([delivery for delivery, _ in todo], settled, ready=ready),
        )
        return [None if held else _refusal(delivery) for (delivery, _), held in zip(todo, verdicts, strict=True)]

    def _settle_rows(self, connection: sqlite3.Connection, todo: Sequence[tuple[Delivery, Outcome]]) -> list[bool]:
        """Whether each was still held."""
        now = self._broker.now()
        acks = [(delivery.receipt.seq_lease, outcome) for delivery, outcome in todo if isinstance(outcome, Ack)]
        acked = iter(settle.acknowledge(connection, now, acks) if acks else ())
        verdicts, ended, lines = [], 0, set()
        for delivery, outcome in todo:
            if isinstance(outcome, Ack):
                final: bool | None = next(acked) or None
            else:
                final = settle.perform(connection, now, delivery.receipt.seq_lease, outcome)
            verdicts.append(final is not None)
            ended += bool(final)
            if final is not None and delivery.receipt.line is not None:
                lines.add(delivery.receipt.line)
        if ended:
            connection.execute("UPDATE subscription SET live = live - ? WHERE id = ?", (ended, self._sub))
        for line in lines:
            settle.advance(connection, self._sub, line)
        return verdicts

    def _after(self, deliveries: Sequence[Delivery], verdicts: Sequence[bool], *, ready: bool) -> None:
        """Right after the commit."""
        suspect = self._suspect
        for delivery, held in zip(deliveries, verdicts, strict=True):
            self._forget(delivery, lost=not held)
        if ready:
            self._broker.announce()
        elif suspect is not self._suspect:
            self._wake.set()

    def _forget(self, delivery: Delivery, *, lost: bool) -> None:
        if self._held.pop(delivery, False) is None:
            self._broker.holders.journal.clear(delivery.receipt.slot)
        delivery.receipt.lost = lost
        delivery.receipt.settled = not lost
        if delivery is self._suspect:
            self._suspect = None

    async def _wait(self, now: float, deadline: float | None) -> None:
        broker = self._broker
        with broker.engine.translated():
            due = self._claimer.next_due(broker.engine.connection, now)
        ends = [moment for moment in (deadline, due, now + _LOOK_AGAIN) if moment is not None]
        self.waiting += 1
        try:
            await broker.clock.wait(self._wake, max(0.0, min(ends) - broker.now()))
        finally:
            self.waiting -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise consumer_closed(self._name)


def _left_to_the_lease(given_back: asyncio.Future[Any]) -> None:
    """Nobody waits for it. If it failed the messages come back when their leases end, which nobody renews."""
    if not given_back.cancelled() and given_back.exception() is not None:
        logger.warning("messages could not be given back, their leases will end: %s", given_back.exception())


def _refusal(delivery: Delivery) -> SettlementError:
    return (lease_over if delivery.receipt.lost else settled_before)(delivery.message.id)
