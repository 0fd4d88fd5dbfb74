"""What the checker of the torture finds in histories, and what it excuses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from postroom.broker.memory import MemoryBroker
from postroom.message import DeadLetter, Failure, Message
from postroom.testing.history import Event
from postroom.torture.check import CHECKS, Checker
from postroom.torture.effects import Effect
from postroom.torture.measure import outcome_of
from postroom.torture.nemesis import Nemesis
from postroom.torture.plan import ACCOUNTS, DEPOSIT, MAX_ATTEMPTS, Errand, Fault, Options, Plan, make_plan
from postroom.torture.processes import Cast, Ended
from postroom.torture.recorder import TOKEN
from postroom.torture.run import Evidence
from tests.conftest import wait_until

TRANSFER = Errand(token="a", at=0.0, kind="transfer", source=0, target=1, amount=10)
DOOMED = Errand(token="d", at=0.0, kind="doomed")
FIRST, SECOND = (Errand(token=f"s{n}", at=0.0, kind="step", key="k", seq=n) for n in (1, 2))


def publish(errand: Errand, outcome: Any = "ok") -> list[Event]:
    return [Event(t=0.0, op="publish", id=errand.token, outcome=each) for each in ("invoke", outcome)]


def handle(
    errand: Errand,
    sub: str,
    begin: float,
    *,
    who: str = "worker-1.1",
    settle: Any = "ack",
    attempt: int = 1,
    **more: Any,
) -> list[Event]:
    """One delivery from receive to settlement, which takes a second."""
    common = {"id": errand.token, "sub": f"run-{sub}", "consumer": who, "attempt": attempt, "message": "m", **more}
    done = "fail" if settle in ("retry", "dead") else "ok"
    return [
        Event(t=begin, asked=begin - 0.1, op="deliver", **common),
        Event(t=begin + 0.1, op="start", key=errand.key, digest=errand.digest, **common),
        Event(t=begin + 0.9, op="end", **{**common, "outcome": done}),
        Event(t=begin + 0.95, op=settle, **{**common, "outcome": "invoke"}),
        Event(t=begin + 1.0, op=settle, **common),
    ]


def letter(errand: Errand, attempts: int = MAX_ATTEMPTS) -> DeadLetter:
    message = Message(id="m", topic="run-doomed", name="doomed", body=b"", headers={TOKEN: errand.token})
    failures = tuple(Failure(attempt=number, reason="error") for number in range(1, attempts + 1))
    return DeadLetter(message=message, subscription="run-doomed", failures=failures, dead_at=0.0)


def evidence(
    history: list[Event], *errands: Errand, effects: tuple[tuple[str, str], ...] = (), **more: Any
) -> Evidence:
    balances = [DEPOSIT] * ACCOUNTS
    if ("transfers", "a") in effects:
        balances[:2] = [DEPOSIT - 10, DEPOSIT + 10]
    plan = Plan(options=Options(seed=1), errands={"producer-1": list(errands)}, faults=[])
    plain: dict[str, Any] = {
        "healed": 60.0,
        "drained": 61.0,
        "ordered": set(),
        "dead": [],
        "stats": [],
        "ended": [],
        "atomic": True,
    }
    return Evidence(
        plan=plan, run="run", begin=0.0, history=sorted(history, key=lambda event: event.t),
        journal=[Effect(f"run-{sub}", token) for sub, token in effects], balances=balances,
        capabilities=MemoryBroker.capabilities, **{**plain, **more},
    )  # fmt: skip


def kinds(given: Evidence) -> set[str]:
    found = {violation.kind for violation in Checker(given).violations()}
    assert found <= CHECKS.keys()
    return found


DONE = (("transfers", "a"),)
SENT = publish(TRANSFER)
ONCE = handle(TRANSFER, "transfers", 1.0)
AGAIN = handle(TRANSFER, "transfers", 5.0, who="worker-2.1", attempt=2)
OTHER = handle(TRANSFER, "transfers", 5.0, message="n")
HELD = ONCE[:2]
"""Started, and never heard of again."""


def fault(op: Any, t: float, who: str = "worker-1.1", until: float | None = None) -> Event:
    return Event(t=t, op=op, id=who, until=until)


def test_a_clean_run() -> None:
    assert kinds(evidence([*SENT, *ONCE], TRANSFER, effects=DONE)) == set()


@pytest.mark.parametrize(
    ("history", "effects", "expected"),
    [
        (SENT, (), {"lost", "money"}),
        ([*SENT, *HELD], (), {"lost", "money"}),
        (ONCE, DONE, {"phantom"}),
        ([*SENT, *ONCE], (), {"effects", "money"}),
        ([*SENT, *ONCE], DONE * 2, {"effects"}),
        ([*SENT, *HELD, *AGAIN], DONE, {"unexplained"}),
        ([*SENT, *ONCE, *AGAIN], DONE, {"unexplained", "resurrected"}),
        ([*SENT, *ONCE, *OTHER], DONE, {"copies", "unexplained", "resurrected"}),
        ([*publish(TRANSFER, "info"), *ONCE], DONE, set()),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_message(
    history: list[Event], effects: tuple[tuple[str, str], ...], expected: set[str]
) -> None:
    assert kinds(evidence(history, TRANSFER, effects=effects)) == expected


@pytest.mark.parametrize(
    ("harm", "excused"),
    [
        (fault("crash", 2.0), True),
        (fault("crash", 2.0, "worker-2.1"), False),
        (fault("crash", 2.0, "worker-1.2"), False),
        (fault("freeze", 1.5, until=9.0), True),
        (fault("cut", 3.0), True),
        (fault("restart", 3.0, "broker", until=4.0), True),
        (fault("crash", 0.5), False),
        (fault("freeze", 0.2, until=0.8), False),
        (fault("freeze", 0.2, until=0.95), True),
        (fault("crash", 6.0), False),
    ],
)
def test_only_a_fault_of_the_holder_explains_a_second_start(harm: Event, excused: bool) -> None:
    found = kinds(evidence([*SENT, *HELD, harm, *AGAIN], TRANSFER, effects=DONE))
    assert found == (set() if excused else {"unexplained"})


def test_a_zombie_that_starts_late_is_excused() -> None:
    late = handle(TRANSFER, "transfers", 1.0)
    zombie = [msgspec.structs.replace(event, t=event.t + 7.0) for event in late[1:3]]
    other = handle(TRANSFER, "transfers", 5.0, who="worker-2.1")
    frozen = fault("freeze", 1.05, until=8.0)
    assert kinds(evidence([*SENT, late[0], frozen, *other, *zombie], TRANSFER, effects=DONE)) == set()


def test_what_was_given_back_under_fault_may_be_there_twice() -> None:
    failed = handle(TRANSFER, "transfers", 1.0, settle="retry")
    twice = [*handle(TRANSFER, "transfers", 5.0, attempt=2), *handle(TRANSFER, "transfers", 9.0, attempt=2)]
    history = [*SENT, *failed, *twice]
    cut = fault("cut", 1.97)
    assert kinds(evidence([*history, cut], TRANSFER, effects=DONE, atomic=False)) == set()
    assert kinds(evidence([*history, cut], TRANSFER, effects=DONE)) == {"unexplained", "resurrected"}
    assert kinds(evidence(history, TRANSFER, effects=DONE, atomic=False)) == {"unexplained", "resurrected"}


def test_a_refused_return_may_have_left_its_copy() -> None:
    """Where the copy is stored first, and then the original is found to belong to another."""
    failed = handle(TRANSFER, "transfers", 1.0, settle="retry")
    refused = [*failed[:-1], msgspec.structs.replace(failed[-1], outcome="fail")]
    twice = [*handle(TRANSFER, "transfers", 5.0, attempt=2), *handle(TRANSFER, "transfers", 9.0, attempt=2)]
    history = [*SENT, *refused, *twice]
    assert kinds(evidence(history, TRANSFER, effects=DONE, atomic=False)) == set()
    assert kinds(evidence(history, TRANSFER, effects=DONE)) == {"unexplained", "resurrected"}
    # Then there is one copy more than deaths, and the first is delivered with the attempt that the second had.
    died = [*handle(TRANSFER, "transfers", 5.0, attempt=2)[:2], fault("crash", 7.0)]
    history = [*SENT, *refused, *died, *handle(TRANSFER, "transfers", 9.0, attempt=2, who="worker-2.1")]
    assert kinds(evidence(history, TRANSFER, effects=DONE, atomic=False)) == set()
    assert kinds(evidence(history, TRANSFER, effects=DONE)) == {"attempts"}


def test_what_the_broker_moves_while_it_is_killed_may_be_there_twice() -> None:
    failed = handle(TRANSFER, "transfers", 1.0, settle="retry")
    twice = [*handle(TRANSFER, "transfers", 9.0, attempt=2), *handle(TRANSFER, "transfers", 13.0, attempt=2)]
    history = [*SENT, *failed, *twice]
    moving, arrived = (fault("restart", t, "broker", until=t + 0.5) for t in (5.0, 11.5))
    assert kinds(evidence([*history, moving], TRANSFER, effects=DONE, atomic=False)) == set()
    assert kinds(evidence([*history, moving], TRANSFER, effects=DONE)) == {"unexplained", "resurrected"}
    assert kinds(evidence([*history, arrived], TRANSFER, effects=DONE, atomic=False)) == {"unexplained", "resurrected"}


def test_a_death_that_took_it_from_no_handler_may_have_left_it_twice() -> None:
    """Where giving back is storing and then letting go, a death between the two is counted for the original."""
    charged = handle(TRANSFER, "transfers", 5.0, attempt=2, who="worker-2.1")
    suspect = [msgspec.structs.replace(event, suspect=event.op == "deliver") for event in charged]
    waited_there = fault("crash", 0.5, "worker-3.1")
    found = kinds(evidence([*SENT, waited_there, *ONCE, *suspect], TRANSFER, effects=DONE, atomic=False))
    assert found == set()
    # The same if the copies came so close that the second took the first one's place.
    overtaken = [msgspec.structs.replace(event, t=event.t + 5.0) for event in ONCE[2:]]
    overtaken[-1] = msgspec.structs.replace(overtaken[-1], outcome="fail")
    history = [*SENT, waited_there, *HELD, *suspect, *overtaken]
    assert kinds(evidence(history, TRANSFER, effects=DONE, atomic=False)) == set()
    for history in ([*SENT, *ONCE, *suspect], [*SENT, waited_there, *ONCE, *charged]):
        found = kinds(evidence(history, TRANSFER, effects=DONE, atomic=False))
        assert found == {"unexplained", "resurrected"}


def test_a_former_holder_must_not_settle() -> None:
    zombie = [msgspec.structs.replace(event, t=event.t + 9.0) for event in ONCE[2:]]
    frozen = fault("freeze", 1.5, until=9.0)
    accepted = evidence([*SENT, *HELD, frozen, *AGAIN, *zombie], TRANSFER, effects=DONE)
    assert kinds(accepted) == {"fencing"}
    refused = [
        msgspec.structs.replace(zombie[-1], outcome="fail") if event is zombie[-1] else event for event in zombie
    ]
    assert kinds(evidence([*SENT, *HELD, frozen, *AGAIN, *refused], TRANSFER, effects=DONE)) == set()


def test_a_rolled_back_order_must_never_be_seen() -> None:
    order = msgspec.structs.replace(TRANSFER, outbox=True, rollback=True)
    assert kinds(evidence(publish(order, "fail"), order)) == set()
    seen = handle(order, "transfers", 1.0)
    assert "phantom" in kinds(evidence([*publish(order, "fail"), *seen], order, effects=DONE))


def test_a_committed_order_is_confirmed_whatever_its_producer_was_told() -> None:
    order = msgspec.structs.replace(TRANSFER, outbox=True)
    assert "lost" in kinds(evidence(publish(order, "info"), order, ordered={"a"}))
    assert kinds(evidence(publish(order, "info"), order)) == set()


def test_steps_take_effect_in_order_and_apart() -> None:
    sent = [*publish(FIRST), *publish(SECOND)]
    one, two = handle(FIRST, "steps", 1.0), handle(SECOND, "steps", 3.0)
    right, wrong = (("steps", "s1"), ("steps", "s2")), (("steps", "s2"), ("steps", "s1"))
    assert kinds(evidence([*sent, *one, *two], FIRST, SECOND, effects=right)) == set()
    assert kinds(evidence([*sent, *one, *two], FIRST, SECOND, effects=wrong)) == {"order"}
    beside = handle(SECOND, "steps", 1.3, who="worker-2.1")
    assert kinds(evidence([*sent, *one, *beside], FIRST, SECOND, effects=right)) == {"order"}


def test_dead_letters_are_complete() -> None:
    tries = [e for n in range(1, 5) for e in handle(DOOMED, "doomed", 2.0 * n, settle="retry", attempt=n)]
    tries += handle(DOOMED, "doomed", 10.0, settle="dead", attempt=5)
    sent = publish(DOOMED)
    assert kinds(evidence([*sent, *tries], DOOMED, dead=[letter(DOOMED)])) == set()
    assert kinds(evidence([*sent, *tries], DOOMED)) == {"dead letters"}
    assert kinds(evidence([*sent, *tries], DOOMED, dead=[letter(DOOMED)] * 2)) == {"dead letters"}
    assert kinds(evidence([*sent, *tries], DOOMED, dead=[letter(DOOMED, 4)])) == {"dead letters"}
    more = handle(DOOMED, "doomed", 12.0, attempt=6)
    assert kinds(evidence([*sent, *tries, *more], DOOMED, dead=[letter(DOOMED)])) >= {"attempts"}
    same = handle(DOOMED, "doomed", 4.0, settle="retry", attempt=1)
    assert kinds(evidence([*sent, *tries[:5], *same], DOOMED, dead=[letter(DOOMED)])) >= {"attempts"}


def test_a_death_counts() -> None:
    crash = fault("crash", 2.0)
    uncounted = handle(TRANSFER, "transfers", 5.0, who="worker-2.1")
    assert kinds(evidence([*SENT, *HELD, crash, *uncounted], TRANSFER, effects=DONE)) == {"attempts"}
    # Before the start was noted it is not charged, but what runs again is a suspect; and of a suspect it is known.
    suspect = [msgspec.structs.replace(event, suspect=True) for event in uncounted]
    assert kinds(evidence([*SENT, *HELD, crash, *suspect], TRANSFER, effects=DONE)) == set()
    late = fault("crash", 3.0)
    assert kinds(evidence([*SENT, *HELD, late, *suspect], TRANSFER, effects=DONE)) == {"attempts"}
    twice = [msgspec.structs.replace(event, suspect=True) for event in HELD]
    assert kinds(evidence([*SENT, *twice, crash, *suspect], TRANSFER, effects=DONE)) == {"attempts"}


def test_a_success_must_not_be_dead() -> None:
    assert kinds(evidence([*SENT, *ONCE], TRANSFER, effects=DONE, dead=[letter(TRANSFER)])) == {"dead letters"}


def test_what_is_left_and_who_has_ended() -> None:
    assert kinds(evidence([*SENT, *ONCE], TRANSFER, effects=DONE, drained=None)) == {"left"}
    away = fault("restart", 15.0, "broker", until=19.0)
    refused = [Ended(actor="worker-1.1", t=20.0, text="exit code 1; its last words:\nError: it cannot be reached")]
    assert kinds(evidence([*SENT, *ONCE], TRANSFER, effects=DONE, ended=refused)) == {"processes"}
    assert kinds(evidence([*SENT, *ONCE, away], TRANSFER, effects=DONE, ended=refused)) == set()
    crashed = [Ended(actor="worker-1.1", t=20.0, text="exit code 1; its last words:\nKeyError: 'x'")]
    assert kinds(evidence([*SENT, *ONCE, away], TRANSFER, effects=DONE, ended=crashed)) == {"processes"}


def test_measured() -> None:
    told = outcome_of(
        evidence([*SENT, *HELD, fault("crash", 2.0), *AGAIN], TRANSFER, effects=DONE),
        broker="b", effects="e", machine="m", command="c",
    )  # fmt: skip
    assert (told.sent, told.handled, told.again, told.faults) == (1, 1, 1, {"kill": 1})
    assert told.redelivery.p50 == pytest.approx(3.1)
    assert sum(part.handled for part in told.timeline) == 1


@pytest.mark.parametrize(
    ("struck", "seconds"),
    [
        ([], 3.1),
        ([fault("restart", 1.5, "broker", until=3.0)], 2.1),
        ([fault("freeze", 2.7, "worker-3.1", until=9.0)], 1.0),
        ([fault("freeze", 2.7, "worker-3.1", until=9.0), fault("restart", 1.5, "broker", until=3.0)], 0.1),
        ([fault("freeze", 2.7, "worker-4.1", until=9.0)], 3.1),
        ([fault("freeze", 5.02, until=5.07, who="worker-2.1")], 3.05),
    ],
)
def test_measured_is_not_how_long_the_next_one_was_struck(struck: list[Event], seconds: float) -> None:
    between = handle(TRANSFER, "transfers", 2.9, who="worker-3.1")[:1]
    history = [*SENT, *HELD, fault("crash", 2.0), *between, *AGAIN, *struck]
    told = outcome_of(
        evidence(history, TRANSFER, effects=DONE), broker="b", effects="e", machine="m", command="c"
    )  # fmt: skip
    assert told.redelivery.p50 == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("harm", "seconds"),
    [
        ([fault("cut", 2.0)], 3.0),
        ([fault("restart", 1.5, "broker", until=3.0)], 2.0),
        ([fault("restart", 1.5, "broker", until=3.0), fault("restart", 3.5, "broker", until=4.0)], 1.5),
    ],
)
def test_measured_is_how_long_it_takes_to_go_on_once_the_broker_is_there(harm: list[Event], seconds: float) -> None:
    told = outcome_of(
        evidence([*SENT, *handle(TRANSFER, "transfers", 5.0), *harm], TRANSFER, effects=DONE),
        broker="b", effects="e", machine="m", command="c",
    )  # fmt: skip
    assert told.resumed.longest == pytest.approx(seconds)


def test_a_broker_is_up_for_as_long_as_it_was_down(tmp_path: Path) -> None:
    noted: list[Event] = []
    faults = [Fault(at=at, kind="restart", target="broker", lasts=0.0) for at in (0.0, 0.3, 0.6, 1.1)]
    cast = Cast(Options(seed=1, workers=0, relays=0, producers=0), tmp_path, {})
    begin = time.monotonic()
    nemesis = Nemesis(faults, cast, begin=begin, restart="true", note=noted.append)
    nemesis.tick(begin)
    wait_until(lambda: bool(nemesis.tick(begin + 0.5) or len(noted) == 2), "the command has ended")
    nemesis.tick(begin + 0.7)
    nemesis.tick(begin + 1.2)
    nemesis.heal()
    assert [event.t - begin for event in noted if event.outcome == "invoke"] == pytest.approx([0.0, 1.2])


def test_plans_have_everything() -> None:
    plan = make_plan(Options(seed=1, faults=("kill", "freeze", "cut", "restart")))
    errands = plan.every_errand().values()
    assert {errand.kind for errand in errands} == {"transfer", "step", "event", "doomed"}
    for trait in ("outbox", "rollback", "shared", "idempotent", "fails"):
        assert any(getattr(errand, trait) for errand in errands), trait
    assert {fault.kind for fault in plan.faults} == {"kill", "freeze", "cut", "restart"}
    assert all(fault.lasts > plan.options.lease for fault in plan.faults if fault.kind == "freeze")
