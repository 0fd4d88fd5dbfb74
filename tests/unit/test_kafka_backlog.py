"""Who is next, when what is to be remembered of a partition hardly fits."""

from __future__ import annotations

import pytest

from postroom.broker.kafka.backlog import Backlog, Item, Part
from postroom.broker.kafka.ledger import FULL, Ledger
from postroom.broker.kafka.wire import Envelope
from postroom.message import Message

COUNT = 2 * FULL
LIMIT = 4096
"""Bytes that Kafka keeps with an offset, unless told otherwise (``offset.metadata.max.bytes``)."""


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_is_out_than_can_be_remembered(ordered: bool) -> None:
    part, backlog = filled(Ledger(0), ordered=ordered)
    assert len(list(backlog.take(COUNT, 1, 0.0))) == FULL
    assert fits(part)


@pytest.mark.parametrize("ordered", [False, True])
def test_after_the_death_of_a_full_holder_all_is_done(ordered: bool) -> None:
    """I1, C7: everything it held is a suspect, which fills the text; they run one at a time, and it empties."""
    first, backlog = filled(Ledger(0), ordered=ordered)
    for item in backlog.take(COUNT, 1, 0.0):
        first.ledger.out[item.offset] = True
    heir = Ledger.read(0, first.ledger.text("me"))
    heir.take_over()
    assert len(heir.deaths) == FULL
    all_gets_done(*filled(heir, ordered=ordered))


@pytest.mark.parametrize("ordered", [False, True])
def test_what_was_given_back_between_done_ones_is_done(ordered: bool) -> None:
    """As many gaps as can be remembered, and nothing is out whose end would close one."""
    ledger = Ledger(0)
    for offset in range(1, COUNT, 2):
        ledger.complete(offset)
    assert ledger.ranges == FULL
    all_gets_done(*filled(ledger, ordered=ordered))


def test_what_is_gone_does_not_stay_in_memory_until_its_time() -> None:
    """C15: what waits for long is moved to another topic, or its partition to another process, at any rate."""
    part, backlog = Part("topic", 0, Ledger(0)), Backlog(False)
    for offset in range(100 * COUNT):
        part.ledger.see(offset)
        message = Message(id=str(offset), topic="topic", name="work", body=b"{}", not_before=1e9)
        backlog.add(Item(part, offset, Envelope(message=message, due=message.not_before)), 0.0)
        if offset >= COUNT:
            backlog.remove(part.items[offset - COUNT], 0.0)
    assert len(part.items) == COUNT
    assert len(backlog._later) <= 3 * COUNT
    assert backlog.next_due() == 1e9


def all_gets_done(part: Part, backlog: Backlog) -> None:
    while part.items:
        taken = list(backlog.take(COUNT, 1, 0.0))
        assert taken, f"{len(part.items)} wait for ever"
        assert fits(part)
        for item in reversed(taken):
            part.ledger.complete(item.offset)
            backlog.remove(item, 0.0)
            assert fits(part)
    assert part.ledger.prefix == COUNT


def filled(ledger: Ledger, *, ordered: bool) -> tuple[Part, Backlog]:
    """A partition of which everything was read, each message with a key of its own."""
    part, backlog = Part("topic", 0, ledger), Backlog(ordered)
    for offset in range(COUNT):
        if ledger.see(offset):
            message = Message(id=str(offset), topic="topic", name="work", body=b"{}", key=str(offset))
            backlog.add(Item(part, offset, Envelope(message=message)), 0.0)
    return part, backlog


def fits(part: Part) -> bool:
    return len(part.ledger.text("0123456789ab")) <= LIMIT
