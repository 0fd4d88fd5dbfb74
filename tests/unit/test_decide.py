"""From what happened to what becomes of the message."""

from __future__ import annotations

import msgspec
import pytest

from postroom import AlreadyProcessed, Reject, Retry, RetryPolicy, Snooze, exponential
from postroom.broker.base import Ack, Dead, Delivery, Release
from postroom.broker.base import Retry as RetryOutcome
from postroom.config import HandlerOptions
from postroom.message import Message
from postroom.worker import decide
from postroom.worker.park import Parking

POLICY = RetryPolicy(max_attempts=3, backoff=exponential(first=2, jitter=False), give_up_on=(KeyError,))
LIMIT = 1000


def delivery(attempt: int = 1, suspect: bool = False) -> Delivery:
    message = Message(id="m", topic="q", name="task", body=b"{}")
    return Delivery(message=message, subscription="q", attempt=attempt, suspect=suspect)


def failed(error: BaseException, attempt: int = 1) -> object:
    try:
        raise error
    except BaseException as raised:
        return decide.failed(raised, delivery(attempt), POLICY, 1.0, LIMIT)


def test_success_keeps_the_result() -> None:
    assert decide.succeeded(None, delivery(), LIMIT) == Ack()
    assert decide.succeeded({"a": 1}, delivery(), LIMIT) == Ack(b'{"a":1}')


@pytest.mark.parametrize("value", [object(), "x" * 2000], ids=["no json", "too large"])
def test_a_result_that_cannot_be_kept_is_not_run_again(value: object) -> None:
    outcome = decide.succeeded(value, delivery(), LIMIT)
    assert isinstance(outcome, Dead)
    assert "ran to its end" in outcome.failure.message


def test_errors_are_retried_with_backoff_until_the_attempts_are_used_up() -> None:
    for attempt, delay in ((1, 2.0), (2, 4.0)):
        outcome = failed(ValueError("no"), attempt)
        assert isinstance(outcome, RetryOutcome)
        assert (outcome.delay, outcome.suspect, outcome.failure.attempt) == (delay, False, attempt)
        assert outcome.failure.error == "ValueError"
        assert "raise error" in outcome.failure.traceback
    assert isinstance(failed(ValueError("no"), 3), Dead)


def test_hopeless_errors_are_dead_at_once() -> None:
    assert isinstance(failed(KeyError("no")), Dead)


def test_signals() -> None:
    assert failed(Snooze(60)) == Release(60)
    retry = failed(Retry("later", delay=7))
    assert isinstance(retry, RetryOutcome)
    assert retry.delay == 7
    backoff = failed(Retry())
    assert isinstance(backoff, RetryOutcome)
    assert backoff.delay == 2
    assert isinstance(failed(Retry(delay=7), 3), Dead)
    rejected = failed(Reject("no such order"))
    assert isinstance(rejected, Dead)
    assert (rejected.failure.reason, rejected.failure.message) == ("rejected", "no such order")
    assert failed(AlreadyProcessed(result=5)) == Ack(b"5")


def test_exits_of_a_handler_count_as_failures() -> None:
    for error in (SystemExit(3), KeyboardInterrupt()):
        assert isinstance(failed(error), RetryOutcome)


def test_a_lost_process_is_retried_soon_as_a_suspect() -> None:
    outcome = decide.lost(delivery(2), POLICY, 1.0, "killed")
    assert isinstance(outcome, RetryOutcome)
    assert (outcome.suspect, outcome.delay, outcome.failure.reason) == (True, decide.LOST_DELAY, "worker_lost")
    assert isinstance(decide.lost(delivery(3), POLICY, 1.0, "killed"), Dead)


def test_timeouts_count() -> None:
    options = HandlerOptions(timeout=2, retry=POLICY)
    outcome = decide.timed_out(delivery(), options, 1.0)
    assert isinstance(outcome, RetryOutcome)
    assert outcome.failure.reason == "timeout"
    assert isinstance(decide.timed_out(delivery(3), options, 1.0), Dead)


def test_a_failure_has_bounded_size_and_survives_the_wire() -> None:
    outcome = failed(ValueError("x" * 100_000))
    assert isinstance(outcome, RetryOutcome)
    assert len(outcome.failure.message) <= decide.MAX_TEXT
    assert len(outcome.failure.traceback) <= decide.MAX_TRACEBACK
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=RetryOutcome) == outcome


def test_unknown_tasks_are_parked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("postroom.worker.park.time.monotonic", lambda: now[0])
    parking = Parking(grace=60, delay=15)
    for _ in range(4):
        assert parking.outcome(delivery()) == Release(15)
        now[0] += 15
    outcome = parking.outcome(delivery())
    assert isinstance(outcome, Dead)
    assert outcome.failure.reason == "unknown_task"
    assert parking.outcome(delivery()) == Release(15), "a redriven one is parked anew"
