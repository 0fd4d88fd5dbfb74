"""Known bugs, to be planted: they prove that the simulation would find them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from postroom.broker.base import Dead, Delivery, Outcome, Release, Retry
from postroom.context import Context
from postroom.errors import PostroomError, SettlementError
from postroom.message import Message, new_id
from postroom.store.base import CancelAnswer, JobStore
from postroom.store.outbox import decode, encode
from postroom.store.outbox.relay import Relay
from postroom.testing.defects import delivering, keeping
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer
from postroom.testing.simulation.app import RETRY, SimulatedApp
from postroom.testing.simulation.world import Setting
from postroom.worker import decide


class _MarksFirst(SimulatedApp):
    def _mark(self, ctx: Context, connection: Any) -> None:
        ctx.once(connection)
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")


class _MarksNothing(SimulatedApp):
    def _mark(self, ctx: Context, connection: Any) -> None:
        """Duplicates are not told from the first."""


class _NoSuspects(SimulatedApp):
    """What may kill its process is run among the others."""

    has_children = False


class _RemovesFirst(Relay):
    """What it does not come to send is gone."""

    def _send(self, rows: Sequence[tuple[int, str]], stop: threading.Event) -> int:
        self._settle([seq for seq, _ in rows], [])
        return super()._send(rows, stop)


class _Renames(Relay):
    """What it sends once more is another message."""

    def _send(self, rows: Sequence[tuple[int, str]], stop: threading.Event) -> int:
        return super()._send([(seq, encode(replace(decode(text), id=new_id()))) for seq, text in rows], stop)


class _SendsBackwards(Relay):
    def _waiting(self, limit: int) -> list[tuple[int, str]]:
        return super()._waiting(limit)[::-1]


class _CountingConsumer(DefectiveConsumer):
    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        return await super().settle([(delivery, _counted(delivery, outcome)) for delivery, outcome in settlements])


def _counted(delivery: Delivery, outcome: Outcome) -> Outcome:
    if not isinstance(outcome, Release) or not outcome.delay:
        return outcome
    told = decide.failure(delivery, "error", None)
    return Dead(told) if delivery.attempt >= RETRY.max_attempts else Retry(delay=outcome.delay, failure=told)


class _CountsSnoozes(DefectiveBroker):
    """What is put off has failed."""

    consumer_class = _CountingConsumer


class _NeverExpires(DefectiveBroker):
    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await super().publish([replace(message, expires_at=None) for message in messages])


class _CancelsNothing(DefectiveBroker):
    @property
    def jobs(self) -> JobStore:
        return _DeafJobs(self.sound.jobs)  # type: ignore[return-value]


class _DeafJobs:
    def __init__(self, sound: JobStore) -> None:
        self._sound = sound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)

    async def cancel(self, job_id: str) -> CancelAnswer:
        return "cancelled"


PLANTS: dict[str, Setting] = {
    "early-ack": Setting(broker=delivering.AcksEarly),
    "no-fence": Setting(broker=delivering.HasNoFencing),
    "no-renewal": Setting(broker=delivering.ExtendsNothing),
    "no-start-notes": Setting(broker=delivering.ForgetsDeaths),
    "mark-before-effect": Setting(app=_MarksFirst),
    "no-mark": Setting(app=_MarksNothing),
    "suspects-among-others": Setting(app=_NoSuspects),
    "relay-removes-first": Setting(relay=_RemovesFirst),
    "relay-renames": Setting(relay=_Renames),
    "relay-backwards": Setting(relay=_SendsBackwards),
    "redrives-twice": Setting(broker=keeping.RedrivesTwice),
    "no-dedup": Setting(broker=keeping.IgnoresDedup),
    "no-uniqueness": Setting(broker=keeping.IgnoresUniqueness),
    "unique-for-good": Setting(broker=keeping.HoldsKeysForGood),
    "no-filter": Setting(broker=keeping.LeaksSubscriptions),
    "no-order": Setting(broker=keeping.ReordersKeys),
    "counts-snoozes": Setting(broker=_CountsSnoozes),
    "never-expires": Setting(broker=_NeverExpires),
    "too-early": Setting(broker=delivering.DeliversEarly),
    "cancels-nothing": Setting(broker=_CancelsNothing),
}
