"""A payment whose worker dies at every step on the way, on SQLite: the balance is right each time."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from postroom.testing.simulation.bank import ACCOUNTS, OPENING
from postroom.testing.simulation.faults import DeathAt
from postroom.testing.simulation.observed import Order
from postroom.testing.simulation.world import Outcome, Setting, simulate

AMOUNT = 7


def orders(random: Random) -> list[list[Order]]:
    pay = {"label": "pay", "amount": AMOUNT}
    return [[Order(label="pay", task="transfer", subscriptions=("payments",), arguments=pay)]]


def pay(faults: DeathAt) -> Outcome:
    return simulate(1, "sqlite", setting=Setting(orders=orders, faults=faults, workers=1, calm_after=1.5), keep=None)


def stage(outcome: Outcome) -> str:
    """How far the worker that died had come."""
    words = [line.split(maxsplit=2) for line in outcome.trace.lines]
    told = {f"{who}: {what}" for _, who, what in words}
    if any(line.startswith("worker1.1: Ack of") for line in told):
        return "settled, and told"
    if not outcome.observed.settled:
        return "settled, not told"
    if not any(run.process == "worker1.1" for run in outcome.observed.runs):
        return "not started"
    # By the next worker, in a process of its own: it is a suspect.
    again = any(what == "paid pay" and who.startswith("child") for _, who, what in words)
    return "started" if again else "paid"


@pytest.mark.timeout(300)
def test_death_at_every_step() -> None:
    alive = DeathAt(0)
    outcome = pay(alive)
    assert not outcome.violations
    (settled,) = outcome.observed.settled
    begin = outcome.observed.orders["pay"].ready_at
    places = [number for number, at in enumerate(alive.times, 1) if begin <= at <= settled.at + 0.01]
    stages: Counter[str] = Counter()
    for place in places:
        outcome = pay(DeathAt(place))
        assert not outcome.violations, (place, outcome.violations, list(outcome.trace.lines)[-20:])
        assert outcome.faults.total() == 1
        assert outcome.observed.ledger == [("pay", AMOUNT)]
        assert outcome.observed.balances[ACCOUNTS[0]] == OPENING - AMOUNT
        stages[stage(outcome)] += 1
    assert stages.keys() == {"not started", "started", "paid", "settled, not told", "settled, and told"}
