"""Many seeds, on all cores; what fails is run again, with every step in its trace."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from postroom.testing.simulation.plants import PLANTS
from postroom.testing.simulation.world import SOUND, Kind, simulate

SHOWN = 60
"""Lines of the trace that are shown of a failure."""
_CHUNK = 10


class Finding(NamedTuple):
    """One seed, and what was wrong in it; nothing, if all was well."""

    seed: int
    kind: Kind
    plant: str | None
    violations: list[str]
    tail: list[str]
    """The last lines of the trace, if something was wrong."""
    faults: Counter[tuple[str, str]]
    """(place, kind)."""
    steps: int

    def __str__(self) -> str:
        found = "\n".join(f"  {violation}" for violation in self.violations)
        tail = "\n".join(self.tail)
        return f"seed {self.seed} on {self.kind}:\n{found}\nthe end of its trace:\n{tail}\nreplay: {self.command}"

    @property
    def command(self) -> str:
        """Replays it."""
        planted = f" --plant {self.plant}" if self.plant else ""
        return f"python -m postroom.testing.simulation --broker {self.kind} --seed {self.seed} --trace{planted}"


def run(seed: int, kind: Kind, plant: str | None = None) -> Finding:
    """One seed."""
    outcome = simulate(seed, kind, setting=PLANTS[plant] if plant else SOUND, keep=SHOWN)
    tail = list(outcome.trace.lines) if outcome.violations else []
    return Finding(seed, kind, plant, outcome.violations, tail, outcome.faults, outcome.steps)


def hunt(seeds: Sequence[int], kind: Kind, plant: str | None = None, *, processes: int = 1) -> Iterator[Finding]:
    """Each of ``seeds``, in their order."""
    if processes == 1:
        yield from (run(seed, kind, plant) for seed in seeds)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        many = len(seeds)
        yield from pool.map(run, seeds, [kind] * many, [plant] * many, chunksize=_CHUNK)
