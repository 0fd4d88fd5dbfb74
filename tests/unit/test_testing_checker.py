"""The checkers of histories: each finds what it is there for, and nothing in a sound history."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from postroom.testing.checker import held_twice, miscounted, out_of_order, resurrected, total_queue
from postroom.testing.history import Event, History, load

LEASE = 30.0


def at(t: float, op: Any, id: str = "m", **fields: Any) -> Event:
    if op == "publish":
        return Event(t=t, op=op, id=id, **fields)
    if op == "crash":
        return Event(t=t, op=op, id=id, **fields)
    made: dict[str, Any] = {"sub": "s", "consumer": "one"}
    if op == "deliver":
        made |= {"attempt": 1, "until": t + LEASE}
    return Event(t=t, op=op, id=id, **(made | fields))


def summary(*events: Event) -> tuple[list[str], list[str], list[str], list[str], int]:
    found = total_queue(events, "s")
    return found.lost, found.unexpected, found.unexplained, found.recovered, found.duplicated


def test_a_sound_history() -> None:
    events = [
        at(0, "publish", outcome="invoke", digest="d"),
        at(0, "publish", digest="d"),
        at(1, "deliver", digest="d"),
        at(2, "retry"),
        at(3, "deliver", attempt=2, digest="d"),
        at(4, "ack"),
    ]
    assert summary(*events) == ([], [], [], [], 1)
    assert total_queue(events, "s").valid
    for checker in (resurrected, held_twice, miscounted, out_of_order):
        assert checker(events, "s") == []


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([at(0, "publish")], (["m"], [], [], [], 0)),
        ([at(0, "publish"), at(1, "deliver")], (["m"], [], [], [], 0)),
        ([at(0, "publish"), at(1, "deliver"), at(2, "ack", outcome="fail")], (["m"], [], [], [], 0)),
        ([at(0, "publish", outcome="fail")], ([], [], [], [], 0)),
        ([at(0, "publish", outcome="info")], ([], [], [], [], 0)),
        ([at(0, "publish", outcome="info"), at(1, "deliver"), at(2, "ack")], ([], [], [], ["m"], 0)),
        ([at(1, "deliver"), at(2, "ack")], ([], ["m"], [], [], 0)),
        ([at(0, "publish", digest="a"), at(1, "deliver", digest="b"), at(2, "ack")], ([], ["m"], [], [], 0)),
        ([at(0, "publish"), at(1, "deliver"), at(1, "deliver", sub="t"), at(2, "ack")], ([], [], [], [], 0)),
    ],
)
def test_lost_unexpected_recovered(events: list[Event], expected: Any) -> None:
    assert summary(*events) == expected


@pytest.mark.parametrize(
    ("between", "again", "explained"),
    [
        ([], 5.0, False),
        ([], 31.0, True),
        ([at(2, "release")], 5.0, True),
        ([at(2, "release", outcome="fail")], 5.0, False),
        ([at(2, "ack", outcome="info")], 5.0, True),
        ([at(2, "ack")], 50.0, False),
        ([at(2, "dead"), at(3, "redrive")], 5.0, True),
        ([at(20, "extend", until=50.0)], 40.0, False),
        ([at(20, "extend", until=50.0)], 51.0, True),
        ([at(2, "crash", id="one")], 5.0, True),
        ([at(2, "crash", id="other")], 5.0, False),
    ],
)
def test_duplicates_need_an_explanation(between: list[Event], again: float, explained: bool) -> None:
    events = [at(0, "publish"), at(1, "deliver"), *between, at(again, "deliver", consumer="two"), at(99, "ack")]
    found = total_queue(events, "s")
    assert (found.unexplained == []) is explained
    assert found.duplicated == 1


def test_what_has_ended_stays_so() -> None:
    done = [at(0, "publish"), at(1, "deliver"), at(2, "ack")]
    assert resurrected([*done, at(3, "deliver")], "s") == ["m"]
    assert resurrected([*done[:2], at(2, "dead"), at(3, "redrive"), at(4, "deliver")], "s") == []
    assert resurrected([*done[:2], at(2, "ack", outcome="info"), at(3, "deliver")], "s") == []


def test_one_holder() -> None:
    first = [at(0, "publish"), at(1, "deliver")]
    assert held_twice([*first, at(5, "deliver", consumer="two")], "s") == ["m"]
    assert held_twice([*first, at(31, "deliver", consumer="two")], "s") == []
    assert held_twice([*first, at(20, "extend", until=50.0), at(31, "deliver", consumer="two")], "s") == ["m"]
    assert held_twice([*first, at(2, "release"), at(5, "deliver", consumer="two")], "s") == []
    assert held_twice([*first, at(2, "crash", id="one"), at(5, "deliver", consumer="two")], "s") == []
    late = at(40, "ack", outcome="fail")
    assert held_twice([*first, at(31, "deliver", consumer="two"), late, at(45, "deliver")], "s") == ["m"]


def test_attempts() -> None:
    first = [at(0, "publish"), at(1, "deliver")]
    assert miscounted([*first, at(2, "retry"), at(3, "deliver", attempt=1)], "s") == ["m"]
    assert miscounted([*first, at(2, "release"), at(3, "deliver", attempt=2)], "s") == ["m"]
    assert miscounted([*first, at(2, "crash", id="one", counted=True), at(3, "deliver", attempt=2)], "s") == []
    assert miscounted([*first, at(2, "crash", id="one"), at(3, "deliver", attempt=2)], "s") == ["m"]
    assert miscounted([*first, at(2, "dead"), at(3, "redrive"), at(4, "deliver", attempt=2)], "s") == ["m"]


def test_order_by_key() -> None:
    both = [at(0, "publish", "a", key="k"), at(0, "publish", "b", key="k")]
    a, b = at(1, "deliver", "a", key="k"), at(3, "deliver", "b", key="k")
    done = at(2, "ack", "a", key="k")
    assert out_of_order([*both, a, done, b], "s") == []
    assert out_of_order([*both, a, b], "s") == ["k"]
    early = at(1, "deliver", "b", key="k")
    assert out_of_order([*both, early, at(2, "ack", "b", key="k"), at(3, "deliver", "a", key="k")], "s") == ["k"]


def write(path: Path, label: str) -> None:
    with History(path) as history:
        for number in range(200):
            history.note(at(float(number), "publish", f"{label}{number}"))


def test_processes_write_into_files(tmp_path: Path) -> None:
    """Several processes may share a file or have one each; a line cut off by a kill is left out."""
    path = tmp_path / "shared.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(path, label)) for label in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    own = tmp_path / "own.jsonl"
    write(own, "c")
    with own.open("ab") as file:
        file.write(b'{"t":7.0,"op":"publ')
    history = load([path, own])
    assert len(history.events) == 600
    assert {event.id for event in history} == {f"{label}{number}" for label in "abc" for number in range(200)}
    assert [event.t for event in history] == sorted(event.t for event in history)
