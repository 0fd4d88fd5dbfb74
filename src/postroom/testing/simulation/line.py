"""The line from a simulated process to its broker: calls fail on it, answers are lost, and what is settled is noted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from postroom.broker.base import Broker, Consumer, Delivery, Outcome
from postroom.errors import PostroomError, SettlementError
from postroom.message import DeadLetter, JobRecord, Message, Progress
from postroom.store.base import CancelAnswer, JobStore
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer
from postroom.testing.simulation.machine import Process
from postroom.testing.simulation.observed import Observed, Settled

T = TypeVar("T")


class Line(DefectiveBroker):
    """Around a broker, in one process."""

    def __init__(self, sound: Broker, process: Process, observed: Observed) -> None:
        super().__init__(sound)
        self._process = process
        self._observed = observed

    async def publish(self, messages: Sequence[Message]) -> list[str | PostroomError]:
        return await self.call("publish", lambda: self.sound.publish(messages))

    async def consume(self, subscription: str, *, lease: float = 30.0) -> Consumer:
        sound = await self.call("consume", lambda: self.sound.consume(subscription, lease=lease))
        return _LineConsumer(sound, self, self._observed)

    async def dead_letters(
        self, subscription: str, *, ids: Sequence[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        return await self.call(
            "dead_letters", lambda: self.sound.dead_letters(subscription, ids=ids, after=after, limit=limit)
        )

    async def redrive(self, subscription: str, ids: Sequence[str]) -> list[str]:
        return await self.call("redrive", lambda: self.sound.redrive(subscription, ids))

    @property
    def jobs(self) -> JobStore:
        return _LineJobs(self.sound.jobs, self)  # type: ignore[return-value]

    async def call(self, what: str, operation: Callable[[], Awaitable[T]]) -> T:
        """Raises ``BrokerUnavailable`` where a fault strikes."""
        process = self._process
        machine = process.machine
        if not process.mortal:
            return await operation()
        machine.faults.before_call(process, what)
        value = await operation()
        machine.faults.after_call(process, what)
        return value

    def note(self, delivery: Delivery, outcome: Outcome) -> None:
        process = self._process
        machine = process.machine
        machine.note(process, f"{type(outcome).__name__} of {delivery.message.id[-6:]} ({delivery.attempt})")
        self._observed.settled.append(
            Settled(
                id=delivery.message.id,
                subscription=delivery.subscription,
                attempt=delivery.attempt,
                outcome=outcome,
                process=process.name,
                at=machine.monotonic,
            )
        )


class _LineConsumer(DefectiveConsumer):
    def __init__(self, sound: Consumer, line: Line, observed: Observed) -> None:
        super().__init__(sound)
        self._line = line

    async def receive(self, max_messages: int, timeout: float | None) -> list[Delivery]:
        return await self._line.call("receive", lambda: self.sound.receive(max_messages, timeout))

    async def settle(self, settlements: Sequence[tuple[Delivery, Outcome]]) -> list[SettlementError | None]:
        async def settle() -> list[SettlementError | None]:
            answers = await self.sound.settle(settlements)
            for (delivery, outcome), error in zip(settlements, answers, strict=True):
                if error is None:
                    self._line.note(delivery, outcome)
            return answers

        return await self._line.call("settle", settle)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self._line.call("extend", lambda: self.sound.extend(deliveries))


class _LineJobs:
    """Job records over the line; what is not named here is passed on."""

    def __init__(self, sound: JobStore, line: Line) -> None:
        self._sound = sound
        self._line = line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)

    async def get(self, job_id: str) -> list[JobRecord]:
        return await self._line.call("get", lambda: self._sound.get(job_id))

    async def cancel(self, job_id: str) -> CancelAnswer:
        return await self._line.call("cancel", lambda: self._sound.cancel(job_id))

    async def report(self, updates: Sequence[tuple[Any, Progress]]) -> None:
        await self._line.call("report", lambda: self._sound.report(updates))

    async def cancelled(self, deliveries: Sequence[Any]) -> list[Any]:
        return await self._line.call("cancelled", lambda: self._sound.cancelled(deliveries))
