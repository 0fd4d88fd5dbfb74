"""What becomes of what was held: what must stay is stored as a copy, and only then the original goes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from postroom.broker.amqp import ladder
from postroom.broker.amqp.confirms import Answer
from postroom.broker.amqp.copies import Copy
from postroom.broker.amqp.held import Held, ack
from postroom.broker.amqp.office import Office
from postroom.broker.base import Ack, Cancel, Dead, Outcome, Release, Retry
from postroom.errors import BrokerUnavailable, LeaseLost, SettlementError

logger = logging.getLogger("postroom.broker.amqp")

Chosen = Mapping[int, tuple[Held, Outcome]]
"""By index in the batch that is settled."""


async def store(office: Office, subscription: str, chosen: Chosen) -> dict[int, SettlementError]:
    """Store the copies that the outcomes demand. Returns an error for each that the server did not take."""
    again: dict[int, tuple[Copy, float]] = {}
    dead: dict[int, Copy] = {}
    now = office.clock.now()
    for index, (held, outcome) in chosen.items():
        copy = held.copy
        if isinstance(outcome, Retry):
            due = _due(now, outcome.delay)
            again[index] = (copy.failed(outcome.failure, suspect=outcome.suspect, due=due), outcome.delay)
        elif isinstance(outcome, Release):
            again[index] = (copy.released(_due(now, outcome.delay)), outcome.delay)
        elif isinstance(outcome, Dead):
            dead[index] = copy.buried(outcome.failure, now)
        else:
            assert isinstance(outcome, Ack | Cancel)
    answers: dict[int, Answer] = {}
    if again:
        answers |= zip(again, await office.put(subscription, list(again.values())), strict=True)
    if dead:
        answers |= zip(dead, await office.bury(subscription, list(dead.values())), strict=True)
    return refused(chosen, answers)


def refused(chosen: Chosen, answers: Mapping[int, Answer]) -> dict[int, SettlementError]:
    return {
        index: SettlementError(f"message {chosen[index][0].copy.message.id}: RabbitMQ did not take its copy: {answer}")
        for index, answer in answers.items()
        if answer != "stored"
    }


def lost(held: Held) -> LeaseLost:
    return LeaseLost(f"message {held.copy.message.id}: the connection was lost; it belongs to somebody else now")


async def give_back(office: Office, subscription: str, returned: Sequence[tuple[Held, Copy, float]]) -> None:
    """Store each as the given copy after so many seconds, then let go of it: what the server need not count.

    If that is not possible it is given back as it is, and the server counts it as tried.
    """
    try:
        answers = await office.put(subscription, [(copy, delay) for _, copy, delay in returned])
    except BrokerUnavailable as error:
        logger.warning("%s: %d messages are given back as tried: %s", subscription, len(returned), error)
        answers = ["unknown"] * len(returned)
    stored = [held for (held, _, _), answer in zip(returned, answers, strict=True) if answer == "stored"]
    ack(stored)
    for (held, _, _), answer in zip(returned, answers, strict=True):
        if answer != "stored" and held.is_ours:
            held.source.give_up(held.tag)
    for source in {held.source for held in stored if held.source.is_alive}:
        await source.barrier()


def _due(now: float, delay: float) -> float | None:
    """When the server cannot wait for so long, the consumer sees to the rest."""
    return now + delay if delay > ladder.LONGEST else None
