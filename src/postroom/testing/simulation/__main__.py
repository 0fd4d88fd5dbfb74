"""``python -m postroom.testing.simulation``: look for a seed that fails, or replay one."""

from __future__ import annotations

import os
import sys
from collections import Counter

import click

from postroom.testing.simulation.hunt import hunt
from postroom.testing.simulation.plants import PLANTS
from postroom.testing.simulation.world import SOUND, Kind, simulate


def _seeds(context: click.Context, option: click.Parameter, text: str | None) -> range | None:
    """``0:500`` as a range."""
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise click.BadParameter(f"{text!r}: write FIRST:END, as 0:500 for 0 to 499", context, option)
    return range(int(first), int(end))


@click.command()
@click.option("--broker", type=click.Choice(["memory", "sqlite"]), default="memory", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="One seed, to be replayed.")
@click.option("--seeds", callback=_seeds, metavar="FIRST:END", help="Many seeds, as 0:500.")
@click.option("--trace", is_flag=True, help="Print every step of --seed.")
@click.option("--plant", type=click.Choice(sorted(PLANTS)), help="Plant a bug that is to be found.")
@click.option("--places", is_flag=True, help="Tell where each kind of fault struck in --seeds.")
@click.option("--processes", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Default: one a core.")
def main(
    broker: Kind, seed: int | None, seeds: range | None, trace: bool, plant: str | None, places: bool, processes: int
) -> None:
    """Run simulated worlds. Exit code 1 if a promise was broken in one of them."""
    if (seed is None) == (seeds is None) or (trace and seed is None):
        raise click.UsageError("give either --seed N, with --trace or without, or --seeds FIRST:END")
    if seed is not None:
        sys.exit(_replay(seed, broker, plant, trace))
    assert seeds is not None
    failed, steps, faults = 0, 0, Counter[tuple[str, str]]()
    for finding in hunt(seeds, broker, plant, processes=processes):
        steps, faults = steps + finding.steps, faults + finding.faults
        if finding.violations:
            failed += 1
            click.echo(f"{finding}\n")
    if places:
        for (place, kind), count in sorted(faults.items()):
            click.echo(f"{count:7,} × {kind} at {place}")
    kinds = Counter[str]()
    for (_, kind), count in faults.items():
        kinds[kind] += count
    told = ", ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common())
    click.echo(f"{len(seeds):,} seeds on {broker}, {failed} failed; {steps:,} steps; faults: {told or 'none'}")
    sys.exit(1 if failed else 0)


def _replay(seed: int, broker: Kind, plant: str | None, trace: bool) -> int:
    setting = PLANTS[plant] if plant else SOUND
    outcome = simulate(seed, broker, setting=setting, detailed=trace, keep=None if trace else 0)
    for line in outcome.trace.lines:
        click.echo(line)
    for violation in outcome.violations:
        click.echo(violation)
    click.echo(f"seed {seed} on {broker}: {len(outcome.violations)} violations, {outcome.steps:,} steps")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    main()
