"""Sequences nobody thought of: Hypothesis drives a broker and a model side by side, and compares them.

For harnesses with a ``ManualClock``::

    def test_any_sequence():
        run_state_machine(MyHarness, max_examples=50)

A failing sequence is shrunk and printed as the steps that lead to it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from postroom.broker.base import Consumer, Dead, Delivery, Outcome, Subscription
from postroom.errors import AlreadySettled, IdempotencyConflict, LeaseLost
from postroom.message import JobState
from postroom.testing.harness import Harness
from postroom.testing.model import Answer, Model, ModelCopy, ModelLease
from postroom.testing.scene import Scene, failure
from postroom.testing.strategies import Draft, drafts, outcomes, picks
from postroom.testing.suite import supports

T = TypeVar("T")

_NEEDS = ("jobs", "delay", "priorities", "ordering", "deduplication", "expiry")
_WINDOW = 200.5
# Expiries and windows end between the moments at which the machine looks: at the very moment both answers are right.
_CONSUMERS = 3
_ROUND = 30
"""Examples after which Hypothesis begins anew: it varies what it has, and so may leave a rule out for long."""
_ANSWERS: dict[type[Any], Answer] = {type(None): "settled", AlreadySettled: "already", LeaseLost: "lost"}


class BrokerMachine(RuleBasedStateMachine):
    """One subscription, up to three consumers, every operation in any order."""

    make_harness: Callable[[], Harness]

    seen: Counter[str]
    """How often each thing happened, over all sequences: what never happened was not tested."""

    @initialize(ordered=st.booleans(), bury=st.booleans(), first=st.lists(drafts, min_size=2, max_size=5))
    def begin(self, ordered: bool, bury: bool, first: list[Draft]) -> None:
        """Hypothesis leaves out some rules in each sequence: without messages and consumers the rest would be idle."""
        self.runner = asyncio.Runner()
        harness = type(self).make_harness()
        assert harness.clock is not None, "the state machine needs a harness with a ManualClock"
        lacking = [need for need in _NEEDS if not supports(harness.capabilities, need)]
        assert not lacking, f"the state machine needs a broker with {', '.join(lacking)}"
        self.scene = Scene(harness)
        self.run(self.scene.__aenter__())
        self.queue = self.run(self.scene.queue(ordered=ordered))
        self.ordered = ordered
        self.model = Model(ordered, self.scene.lease)
        self.consumers: dict[int, Consumer] = {}
        self.opened = 0
        self.deliveries: list[tuple[int, Delivery, ModelLease]] = []
        self.published: list[str] = []
        self.open_consumer()
        self.open_consumer()
        for draft in first:
            self.put(draft)
        if bury:
            for entry in self.fetch(1, 1):
                self.settle_one(*entry, Dead(failure()))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        if hasattr(self, "scene"):
            self.run(self.scene.__aexit__(None, None, None))
            self.runner.close()

    @property
    def now(self) -> float:
        return self.scene.now()

    @rule(several=st.lists(drafts, min_size=1, max_size=3))
    def publish(self, several: list[Draft]) -> None:
        for draft in several:
            self.put(draft)

    def put(self, draft: Draft) -> None:
        message = self.scene.message(
            self.queue,
            draft.body,
            not_before=None if draft.delay is None else self.now + draft.delay,
            expires_at=None if draft.lifetime is None else self.now + draft.lifetime,
            priority=draft.priority,
            key=draft.key,
            idempotency_key=draft.idempotency_key,
            dedup_window=_WINDOW,
            result_ttl=1e9,
        )
        (answer,) = self.run(self.scene.broker.publish([message]))
        expected = self.model.publish(message, self.now)
        if expected is None:
            assert isinstance(answer, IdempotencyConflict), answer
            self.seen["conflict"] += 1
        else:
            assert answer == expected
            self.seen["published" if answer == message.id else "deduplicated"] += 1
            self.published.append(expected)

    @precondition(lambda self: self.published)
    @rule(pick=picks)
    def publish_again(self, pick: int) -> None:
        """The same message, as after an unknown outcome: nothing changes."""
        copy = self.pick_copy(pick)
        if copy is not None and copy.message.idempotency_key is None:
            assert self.run(self.scene.broker.publish([copy.message])) == [copy.message.id]

    @precondition(lambda self: len(self.consumers) < _CONSUMERS)
    @rule()
    def open_consumer(self) -> None:
        self.opened += 1
        self.consumers[self.opened] = self.run(self.scene.consume(self.queue))

    @precondition(lambda self: self.consumers)
    @rule(pick=picks)
    def close_consumer(self, pick: int) -> None:
        number = self.pick_consumer(pick)
        self.run(self.consumers.pop(number).close())
        for copy in self.model.copies.values():
            if copy.lease is not None and copy.lease.consumer == number:
                self.given_back(copy)
                self.seen["given back by close"] += 1
        self.deliveries = [entry for entry in self.deliveries if entry[0] != number]

    @precondition(lambda self: self.consumers)
    @rule(pick=picks, count=st.integers(1, 4))
    def receive(self, pick: int, count: int) -> None:
        self.fetch(self.pick_consumer(pick), count)

    @precondition(lambda self: self.consumers)
    @rule(pick=picks, count=st.integers(1, 3), started=st.booleans(), cancel=st.booleans(), outcome=outcomes)
    def handle(self, pick: int, count: int, started: bool, cancel: bool, outcome: Outcome) -> None:
        """Receive and settle in one step; in between somebody may have cancelled it."""
        for number, delivery, lease in self.fetch(self.pick_consumer(pick), count):
            if started:
                self.note_start(number, delivery, lease)
            if cancel:
                self.cancel_one(delivery.message.id)
            self.settle_one(number, delivery, lease, outcome)

    @precondition(lambda self: self.consumers)
    @rule(pick=picks, count=st.integers(1, 3), started=st.booleans())
    def freeze(self, pick: int, count: int, started: bool) -> None:
        """A consumer receives, perhaps starts, and lets its leases end."""
        for entry in self.fetch(self.pick_consumer(pick), count):
            if started:
                self.note_start(*entry)
        self.advance(31.0)

    def fetch(self, number: int, count: int) -> list[tuple[int, Delivery, ModelLease]]:
        now = self.now
        allowed = {copy.message.id: copy for copy in self.model.deliverable(now, certain=False)}
        must_go = self.model.deliverable(now, certain=True)
        may_suspect = not self.model.holds_suspect(number, now, lapsed=False)
        must_suspect = not self.model.holds_suspect(number, now, lapsed=True)
        got = self.run(self.scene.receive(self.consumers[number], count))
        fetched: list[tuple[int, Delivery, ModelLease]] = []
        for delivery in got:
            copy = allowed.get(delivery.message.id)
            assert copy is not None, f"{delivery.message.id} must not be delivered now"
            assert copy.is_same(delivery.message)
            lease = self.model.deliver(delivery, number, now)
            assert (delivery.attempt, delivery.suspect) == (copy.counted + 1, copy.suspect)
            # Without notes of starts, all that a dead holder had counts.
            lease.started = not self.scene.broker.capabilities.start_notes
            fetched.append((number, delivery, lease))
            self.seen["delivered again" if delivery.attempt > 1 else "delivered"] += 1
            self.seen.update(suspect=delivery.suspect, redriven=copy.redriven > 0)
        suspects = sum(delivery.suspect for delivery in got)
        assert suspects <= may_suspect, "at most one suspect at a time"
        taken = {delivery.message.id for delivery in got}
        left = [copy for copy in must_go if copy.message.id not in taken and not copy.may_be_suspect]
        if must_suspect and not suspects and len(got) < count:
            left += [copy for copy in must_go if copy.message.id not in taken and copy.may_be_suspect]
        assert len(got) == count or not left, f"{len(left)} more are ready, and only {len(got)} came"
        lowest = min((delivery.message.priority for delivery in got), default=0)
        assert all(copy.message.priority <= lowest for copy in left), "a higher priority was left"
        self.deliveries += fetched
        return fetched

    @precondition(lambda self: self.deliveries)
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        self.note_start(*self.deliveries[pick % len(self.deliveries)])

    def note_start(self, number: int, delivery: Delivery, lease: ModelLease) -> None:
        if lease.until > self.now:
            self.consumers[number].started([delivery])
            lease.started = True

    @precondition(lambda self: self.deliveries)
    @rule(pick=picks, outcome=outcomes)
    def settle(self, pick: int, outcome: Outcome) -> None:
        """Any delivery there ever was: also settled ones and those whose lease is over."""
        self.settle_one(*self.deliveries[pick % len(self.deliveries)], outcome)

    def settle_one(self, number: int, delivery: Delivery, lease: ModelLease, outcome: Outcome) -> None:
        if delivery.message.id not in self.model.copies:
            return  # Discarded since.
        (error,) = self.run(self.consumers[number].settle([(delivery, outcome)]))
        answer = _ANSWERS[type(error)]
        assert self.model.settle(delivery.message.id, lease, outcome, answer, self.now), f"wrong answer: {error!r}"
        self.seen[type(outcome).__name__ if error is None else answer] += 1

    @precondition(lambda self: self.deliveries)
    @rule(pick=picks)
    def extend(self, pick: int) -> None:
        number, delivery, lease = self.deliveries[pick % len(self.deliveries)]
        lost = self.run(self.consumers[number].extend([delivery]))
        assert self.model.extend(delivery.message.id, lease, not lost, self.now), f"extend gave {lost}"
        self.seen["extension refused" if lost else "extended"] += 1

    @rule(seconds=st.sampled_from([1.0, 7.0, 16.0, 31.0, 120.0]))
    def advance(self, seconds: float) -> None:
        """31 s end every lease that is not extended: so dies a consumer."""
        self.run(self.scene.pass_time(seconds))

    @precondition(lambda self: self.published)
    @rule(pick=picks)
    def redrive(self, pick: int) -> None:
        copy = self.pick_dead(pick)
        if copy is not None:
            moved = self.run(self.scene.broker.redrive(self.queue, [copy.message.id]))
            assert moved == ([copy.message.id] if self.model.redrive(copy.message.id, self.now) else [])

    @precondition(lambda self: self.model.deaths and self.consumers)
    @rule(pick=picks)
    def redrive_and_receive(self, pick: int) -> None:
        """Back from the dead, and out again beside the others."""
        message_id = self.model.deaths[pick % len(self.model.deaths)]
        assert self.run(self.scene.broker.redrive(self.queue, [message_id])) == [message_id]
        assert self.model.redrive(message_id, self.now)
        self.fetch(self.pick_consumer(pick), 4)

    @precondition(lambda self: self.published)
    @rule(pick=picks)
    def discard(self, pick: int) -> None:
        copy = self.pick_dead(pick)
        if copy is not None:
            gone = self.run(self.scene.broker.discard(self.queue, [copy.message.id]))
            assert gone == ([copy.message.id] if self.model.discard(copy.message.id) else [])
            self.seen["discarded"] += len(gone)

    @precondition(lambda self: self.published)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        copy = self.pick_copy(pick)
        if copy is not None:
            self.cancel_one(copy.message.id)

    def cancel_one(self, message_id: str) -> None:
        answer = self.run(self.scene.broker.jobs.cancel(message_id))
        assert self.model.cancel(message_id, answer, self.now), f"cancel gave {answer!r}"
        self.seen[f"cancel {answer}"] += 1

    @precondition(lambda self: self.deliveries)
    @rule()
    def purge(self) -> None:
        waiting = [copy for copy in self.model.copies.values() if copy.end is None and not copy.runs(self.now)]
        doubtful = [copy for copy in waiting if copy.in_doubt(self.now)]
        purged = self.run(self.scene.broker.purge(self.queue))
        assert len(waiting) - len(doubtful) <= purged <= len(waiting)
        self.seen["purged"] += purged
        for copy in waiting:
            if copy in doubtful:
                self.noticed(copy)
            else:
                copy.end = JobState.CANCELLED

    @rule()
    def redeclare(self) -> None:
        again = Subscription(name=self.queue, pattern=self.queue, ordered=self.ordered)
        self.run(self.scene.broker.declare([], [again]))

    @invariant()
    def nothing_is_lost_or_invented(self) -> None:
        """Counts, dead letters and every record are those of the model."""
        if not hasattr(self, "scene"):
            return
        now = self.now
        if not any(copy.in_doubt(now) for copy in self.model.copies.values()):
            assert self.run(self.scene.counts(self.queue)) == self.model.counts(now)
        letters = self.run(self.scene.broker.dead_letters(self.queue, limit=1_000))
        # Of those that died at the same moment none is the older.
        assert {letter.message.id for letter in letters} == set(self.model.deaths)
        times = [letter.dead_at for letter in letters]
        assert times == sorted(times), "dead letters are listed oldest first"
        for letter in letters:
            copy = self.model.copies[letter.message.id]
            assert copy.is_same(letter.message)
            assert letter.redriven == copy.redriven
            assert len(letter.failures) == copy.failures
        records = self.run(self.scene.broker.jobs.search(subscription=self.queue, limit=1_000))
        assert {record.id for record in records} == self.model.copies.keys()
        for record in records:
            shown, allowed = (record.state, len(record.failures)), self.model.copies[record.id].shown(now)
            assert shown in allowed, f"{record.id} shows {shown}, which should be {allowed}"
            self.seen["shown as expired"] += record.state is JobState.EXPIRED

    def given_back(self, copy: ModelCopy) -> None:
        """Its consumer was closed: released, unless the broker had noticed before that the lease was over."""
        record = self.run(self.scene.record(copy.message.id))
        if len(record.failures) > copy.failures:
            copy.recover(self.now)
        else:
            copy.give_back(self.now)
        if record.state is JobState.EXPIRED and copy.expired(self.now):
            copy.end = JobState.EXPIRED

    def noticed(self, copy: ModelCopy) -> None:
        """Take over what the broker has made of a copy in doubt, if that is one of the things allowed."""
        record = self.run(self.scene.record(copy.message.id))
        if record.state is JobState.RUNNING:
            return
        if copy.lease is not None:
            copy.recover(self.now)
        assert len(record.failures) == copy.failures
        copy.end = record.state
        assert record.state in (JobState.CANCELLED, JobState.EXPIRED), record.state

    def pick_copy(self, pick: int) -> ModelCopy | None:
        return self.model.copies.get(self.published[pick % len(self.published)])

    def pick_dead(self, pick: int) -> ModelCopy | None:
        """Mostly one that is dead."""
        if self.model.deaths and pick % 4:
            return self.model.copies[self.model.deaths[pick % len(self.model.deaths)]]
        return self.pick_copy(pick)

    def pick_consumer(self, pick: int) -> int:
        return sorted(self.consumers)[pick % len(self.consumers)]


def run_state_machine(
    make_harness: Callable[[], Harness], *, max_examples: int = 50, steps: int = 40, shrink: bool = True
) -> Counter[str]:
    """Play ``max_examples`` sequences of up to ``steps`` operations, each on a fresh harness.

    The sequences are the same in each run. ``shrink``: make a failing one as short as possible before it is shown.
    Returns how often each thing happened; a thing that is missing was not tested.
    """
    seen: Counter[str] = Counter()
    for number, begin in enumerate(range(0, max_examples, _ROUND)):
        machine = type("Machine", (BrokerMachine,), {"make_harness": staticmethod(make_harness), "seen": seen})
        run_state_machine_as_test(
            # A test that fails now and then is a test nobody trusts; whoever hunts raises max_examples.
            seed(number)(machine),
            settings=settings(
                max_examples=min(_ROUND, max_examples - begin),
                stateful_step_count=steps,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    return seen
