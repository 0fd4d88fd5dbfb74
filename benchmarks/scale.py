"""How much to measure: enough to trust, or just enough to see that the scripts work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a run. Messages are counted, durations are seconds."""

    runs: int
    """Interleaved pairs (floor, ours) of each comparison."""
    messages: int
    """Jobs of one run of a worker or a producer."""
    concurrent: int
    """``aenqueue`` calls of each of 64 concurrent producers."""
    samples: int
    """Jobs of one run of the latency measurement."""
    pause: float
    """Mean pause between two of them."""
    idle: float
    """Seconds for which an idle worker is watched."""
    few: int
    many: int
    drained: int
    """Of the many, so many are drained in each run."""
    requests: int
    """HTTP requests of one run."""
    imports: int


FULL = Scale(
    runs=5, messages=50_000, concurrent=100, samples=300, pause=0.04, idle=12.0,
    few=10_000, many=1_000_000, drained=30_000, requests=8_000, imports=10,
)  # fmt: skip

QUICK = Scale(
    runs=1, messages=600, concurrent=3, samples=10, pause=0.01, idle=0.5,
    few=300, many=900, drained=300, requests=100, imports=2,
)  # fmt: skip
