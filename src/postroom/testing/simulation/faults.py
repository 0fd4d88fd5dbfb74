"""What goes wrong, where and when: drawn from the seed."""

from __future__ import annotations

import sqlite3
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from postroom.errors import BrokerUnavailable
from postroom.testing.simulation.machine import Died

if TYPE_CHECKING:
    from postroom.testing.simulation.machine import Machine, Process

CALM_AFTER = 4.0
"""Simulated seconds after which nothing goes wrong any more."""


class Rates(NamedTuple):
    """How probable each fault is, at each place where it can happen."""

    death: float = 0.0
    """Of the process, at a step or a statement."""
    freeze: float = 0.0
    """For longer or shorter than a lease, at a step."""
    stop: float = 0.0
    """SIGTERM, at a step."""
    disk: float = 0.0
    """An error of the disk, at a statement."""
    refused: float = 0.0
    """The broker cannot be reached, and nothing was done, at a call."""
    unknown: float = 0.0
    """The broker has done it, but its answer is lost, at a call."""
    jump: float = 0.0
    """Of the machine's wall clock, at a step."""


_EXPOSED = 8
"""Steps of a process after it has committed something, called the broker or begun a handler."""
_MORE = 6.0
"""How many times more probable faults are in these: between two effects is where they hurt."""
_RARE = 8
"""Visits of a statement or a call with as many more faults."""

_SCALE = Rates(
    death=1 / 400, freeze=1 / 800, stop=1 / 1500, disk=1 / 300, refused=1 / 60, unknown=1 / 60, jump=1 / 1500
)


def drawn(random: Random, *, unknown: bool, jumps: bool) -> Rates:
    """Some seeds see one kind of fault, some all, some none. ``unknown``: answers can be lost; ``jumps``: the
    clock may."""
    if random.random() < 0.05:
        return Rates()
    severity = random.choice([0.3, 1.0, 1.0, 3.0])
    rates = {name: rate * severity * random.choice([0, 0, 1, 1, 2]) for name, rate in _SCALE._asdict().items()}
    return Rates(**{**rates, "unknown": rates["unknown"] * unknown, "jump": rates["jump"] * jumps})


class Faults:
    """Decides at every place; asked by the machine, by SQL connections and by the line to the broker."""

    def __init__(self, random: Random, rates: Rates, *, lease: float, limit: int = 12) -> None:
        self._random = random
        self._rates = rates
        self._step_rate = rates.death + rates.freeze + rates.stop + rates.jump
        self._lease = lease
        self._left = limit
        self._visits: Counter[str] = Counter()
        self.machine: Machine
        self.calm = False
        self.seen: Counter[tuple[str, str]] = Counter()
        """(place, kind) of those that struck."""

    def before_step(self, process: Process) -> bool:
        """Whether the process can no longer take its step: it lost its turn to a fault."""
        rate = self._step_rate
        if process.exposed:
            process.exposed -= 1
            rate *= _MORE
        if not self._happens(rate):
            return False
        rates = self._rates
        (kind,) = self._random.choices(
            ("death", "freeze", "stop", "jump"), (rates.death, rates.freeze, rates.stop, rates.jump)
        )
        self._count(f"step of a {process.role}", kind)
        if kind == "death":
            self.machine.kill(process)
        elif kind == "freeze":
            self.machine.freeze(
                process, self._random.choice([0.3, 1.0, 2.5]) * self._lease * self._random.uniform(0.5, 1.5)
            )
        elif kind == "stop":
            self.machine.terminate(process)
        else:
            self._jump()
        return True

    def before_statement(self, process: Process, sql: str) -> None:
        place = _place(process, sql)
        often = self._often(place)
        if self._happens(self._rates.death * often):
            self._die(process, "before", sql)
        if not sql.startswith("ROLLBACK") and self._happens(self._rates.disk * often):
            self._count(place, "disk")
            self._cut_off(process)
            self.machine.note(process, f"the disk fails at {_short(sql)}")
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR, "SQLITE_IOERR"
            raise error

    def after_statement(self, process: Process, sql: str) -> None:
        if sql == "COMMIT":
            self.expose(process)
        if self._happens(self._rates.death * self._often(_place(process, sql))):
            self._die(process, "after", sql)

    def expose(self, process: Process) -> None:
        """Something has just been done that must not be done twice, or must not be all."""
        process.exposed = _EXPOSED

    def before_call(self, process: Process, what: str) -> None:
        if self._happens(self._rates.refused * self._often(what)):
            self._count(what, "refused")
            self._cut_off(process)
            self.machine.note(process, f"{what} is refused")
            raise BrokerUnavailable(f"simulated: {what} did not reach the broker")

    def after_call(self, process: Process, what: str) -> None:
        self.expose(process)
        if self._happens(self._rates.unknown * self._often(what)):
            self._count(what, "unknown")
            self._cut_off(process)
            self.machine.note(process, f"the answer to {what} is lost")
            raise BrokerUnavailable(f"simulated: the answer to {what} was lost")

    def _often(self, place: str) -> float:
        """What is done a few times a run is struck as often as what is done all the time."""
        self._visits[place] += 1
        return _MORE if self._visits[place] <= _RARE else 1.0

    def _happens(self, rate: float) -> bool:
        return not self.calm and self._left > 0 and rate > 0 and self._random.random() < rate

    def _count(self, place: str, kind: str) -> None:
        self._left -= 1
        self.seen[place, kind] += 1

    def _cut_off(self, process: Process) -> None:
        """It may lose leases by this."""
        now = self.machine.monotonic
        process.troubles.append((now, now + 2 * self._lease))

    def _die(self, process: Process, when: str, sql: str) -> None:
        self._count(_place(process, sql), f"death {when} it")
        self.machine.kill(process, f"dies {when} {_short(sql)}")
        raise Died

    def _jump(self) -> None:
        seconds = self._random.choice([-1, 1]) * self._random.choice([0.5, 5.0, 3600.0])
        self.machine.wall_offset += seconds
        self.machine.note(None, f"the clock is set by {seconds:+.1f} s")


class DeathAt(Faults):
    """Nothing goes wrong but this: the first worker dies at one place, chosen by its number."""

    def __init__(self, place: int) -> None:
        """``place``: its steps and statements count from 1; at 0 it does not die."""
        super().__init__(Random(0), Rates(), lease=0.0)
        self._place = place
        self.times: list[float] = []
        """When each place was passed."""

    def before_step(self, process: Process) -> bool:
        if self._is_here(process):
            self._count("step of a worker", "death")
            self.machine.kill(process)
        return process.dead

    def before_statement(self, process: Process, sql: str) -> None:
        if self._is_here(process):
            self._die(process, "before", sql)

    def after_statement(self, process: Process, sql: str) -> None:
        if self._is_here(process):
            self._die(process, "after", sql)

    def _is_here(self, process: Process) -> bool:
        if process.name != "worker1.1":
            return False
        self.times.append(self.machine.monotonic)
        return len(self.times) == self._place


def _place(process: Process, sql: str) -> str:
    verb, *_ = sql.split(maxsplit=1)
    return f"{verb} of a {process.role}"


def _short(sql: str) -> str:
    return " ".join(sql.split())[:60]
