"""What of a partition is done: against a model that keeps every offset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from postroom.broker.kafka.ledger import FULL, Ledger


def test_the_prefix_grows_over_what_is_done() -> None:
    ledger = Ledger(10)
    for offset in range(10, 15):
        assert ledger.see(offset)
    ledger.complete(12)
    ledger.complete(11)
    assert ledger.prefix == 10
    ledger.complete(10)
    assert (ledger.prefix, ledger.next) == (13, 15)


def test_offsets_that_do_not_exist_are_done() -> None:
    """Compaction, transactions and deletion leave gaps; a prefix that waited for them would wait for ever."""
    ledger = Ledger(0)
    ledger.see(0)
    ledger.see(7)
    assert [ledger.is_done(offset) for offset in (0, 1, 6, 7)] == [False, True, True, False]
    ledger.complete(0)
    assert ledger.prefix == 7


def test_what_was_seen_before_is_not_seen_again() -> None:
    ledger = Ledger(None)
    assert ledger.see(5)
    assert not ledger.see(5)
    assert not ledger.see(4)
    assert ledger.prefix == 5


def test_what_a_former_holder_has_done_may_be_ahead_of_what_was_seen() -> None:
    """Records come in batches: the next is no sign that the log begins anew."""
    former = Ledger(0)
    for offset in range(10):
        former.see(offset)
    for offset in range(1, 10):
        former.complete(offset)
    heir = Ledger.read(0, former.text("me"))
    heir.see(0)
    heir.complete(0)
    assert (heir.prefix, heir.next, heir.resume) == (10, 1, 10)
    assert not heir.see(1)
    assert heir.see(10)


def test_what_nobody_wants_needs_no_words() -> None:
    """A filter that wants every second of thousands: each would be a range, and only so many fit."""
    ledger = Ledger(0)
    for offset in range(6000):
        ledger.see(offset)
        if offset % 2:
            ledger.skip(offset)
    assert (ledger.ranges, ledger.prefix) == (0, 0)
    ledger.complete(1000)
    assert (ledger.ranges, ledger.last_done) == (1, 1002)
    for offset in range(0, 6000, 2):
        ledger.complete(offset)
    assert (ledger.ranges, ledger.prefix) == (0, 6000)


def test_the_first_can_always_be_handed_out() -> None:
    ledger = Ledger(0)
    for offset in range(2 * FULL + 2):
        ledger.see(offset)
        if offset % 2:
            ledger.complete(offset)
    assert [ledger.has_room(offset) for offset in (0, 2, 4)] == [True, False, False]
    ledger.complete(0)
    assert ledger.has_room(2)


def test_a_death_is_charged_to_what_had_started() -> None:
    ledger = Ledger(0)
    for offset in range(4):
        ledger.see(offset)
        ledger.hand_out(offset)
    ledger.out[1] = True
    ledger.complete(3)
    heir = Ledger.read(0, ledger.text("me"))
    heir.take_over()
    assert heir.deaths == {0: 0, 1: 1, 2: 0}, "what may have started unseen is a suspect, uncharged"
    assert heir.out == {}
    assert heir.is_done(3)
    heir.hand_out(0)
    second = Ledger.read(0, heir.text("heir"))
    second.take_over()
    assert second.deaths[0] == 1, "a suspect counts as started as soon as it is handed out"


def test_what_was_released_is_charged_to_nobody() -> None:
    ledger = Ledger(0)
    ledger.see(0)
    ledger.hand_out(0)
    heir = Ledger.read(0, ledger.text("me", released=True))
    heir.take_over()
    assert heir.deaths == {}


@pytest.mark.parametrize("text", [None, "", "somebody's own words", "p2;a;;;;", "p1;a;;", "p1;;x+1;;;"])
def test_a_text_of_somebody_else_says_nothing(text: str | None) -> None:
    ledger = Ledger.read(7, text)
    assert (ledger.prefix, ledger.next, ledger.out, Ledger.writer(text)) == (7, 7, {}, "")


@given(st.sets(st.integers(0, 10**7), max_size=FULL), st.integers(0, 2**40))
def test_the_text_fits(offsets: set[int], base: int) -> None:
    """Kafka keeps 4,096 bytes with an offset, unless told otherwise."""
    ledger = Ledger(base)
    for offset in offsets:
        ledger.complete(base + 1 + offset)
    assert len(ledger.text("0123456789ab")) <= 4096


class Model(RuleBasedStateMachine):
    """Every operation, and after each a look at every offset; taking over included."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(100)
        self.done: set[int] = set()
        self.missing: set[int] = set()
        self.unwanted: set[int] = set()
        self.out: dict[int, bool] = {}
        self.deaths: dict[int, int] = {}
        self.seen = 100

    @rule(gap=st.integers(0, 3), wanted=st.booleans())
    def see(self, gap: int, wanted: bool) -> None:
        self.missing.update(range(self.seen, self.seen + gap))
        self.done.update(self.missing)
        self.seen += gap
        assert self.ledger.see(self.seen) == (self.seen not in self.done)
        if not wanted:
            self.ledger.skip(self.seen)
            self.unwanted.add(self.seen)
            self.done.add(self.seen)
        self.seen += 1

    def _open(self, number: int) -> int | None:
        waiting = [offset for offset in range(100, self.seen) if offset not in self.done]
        return waiting[number % len(waiting)] if waiting else None

    @rule(number=st.integers(0, 50), started=st.booleans())
    def hand_out(self, number: int, started: bool) -> None:
        offset = self._open(number)
        if offset is not None and offset not in self.out:
            self.ledger.hand_out(offset)
            self.out[offset] = offset in self.deaths
            if started:
                self.ledger.out[offset] = self.out[offset] = True

    @rule(number=st.integers(0, 50))
    def complete(self, number: int) -> None:
        offset = self._open(number)
        if offset is not None:
            self.ledger.complete(offset)
            self.done.add(offset)
            self.out.pop(offset, None)
            self.deaths.pop(offset, None)

    @rule(number=st.integers(0, 50))
    def give_back(self, number: int) -> None:
        offset = self._open(number)
        if offset is not None:
            self.ledger.give_back(offset)
            self.out.pop(offset, None)

    @rule(released=st.booleans())
    def pass_on(self, released: bool) -> None:
        self.ledger = Ledger.read(self.ledger.prefix, self.ledger.text("x", released=released))
        self.ledger.take_over()
        if not released:
            for offset, started in self.out.items():
                self.deaths[offset] = self.deaths.get(offset, 0) + started
        self.out.clear()
        for offset in range(self.ledger.resume or 0, self.seen):
            if offset not in self.missing and self.ledger.see(offset) and offset in self.unwanted:
                self.ledger.skip(offset)

    @invariant()
    def agrees(self) -> None:
        first_open = next((offset for offset in range(100, self.seen) if offset not in self.done), self.seen)
        assert self.ledger.prefix == first_open
        assert all(self.ledger.is_done(offset) == (offset in self.done) for offset in range(100, self.seen))
        assert (self.ledger.out, self.ledger.deaths) == (self.out, self.deaths)
        told = self.ledger.text("").split(";")[2]
        assert self.ledger.ranges == len(list(filter(None, told.split(",")))) + len(self.out) + len(self.deaths)


TestModel = Model.TestCase
