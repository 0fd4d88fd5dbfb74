"""Whether a long queue is as quick as a short one, and needs no more memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import producing
from benchmarks.child import Child, await_go, peak_memory, run, run_together
from benchmarks.pulse import pulse, rate
from benchmarks.scale import Scale
from benchmarks.table import Result, Target, median

SPEED_TARGET = Target(">=", 0.8)
MEMORY_TARGET = Target("<=", 100.0, "MB")


def drain(count: int) -> dict[str, Any]:
    """In a child: a worker until it has run ``count`` jobs. Returns when they ran, and its peak memory in MB."""
    from benchmarks.tasks import app

    pulse.stop_after(count)
    await_go()
    app.run_worker(queues=["quick"])
    app.close()
    return {"memory": peak_memory(), **pulse.times()}


def measure(scale: Scale, folder: Path) -> list[Result]:
    full = f"sqlite:///{folder}/many.db"
    run(producing.enqueue, broker=full, task="noop", count=scale.many)
    few, many, memory = [], [], []
    for number in range(min(scale.runs, scale.many // scale.drained)):
        short = f"sqlite:///{folder}/few-{number}.db"
        run(producing.enqueue, broker=short, task="noop", count=scale.few)
        few.append(rate(run_together([Child(drain, broker=short, count=scale.few)])))
        result = run_together([Child(drain, broker=full, count=scale.drained)])
        many.append(rate(result))
        memory.append(result[0]["memory"])
    ratios = tuple(slow / fast for slow, fast in zip(many, few, strict=True))
    return [
        Result(name=f"drain, {scale.few:,} wait", unit="jobs/s", postroom=median(few), runs=tuple(few)),
        Result(name=f"drain, {scale.many:,} wait", unit="jobs/s", postroom=median(many), runs=tuple(many)),
        Result(name="many against few", unit="times jobs/s", postroom=median(ratios), runs=ratios, target=SPEED_TARGET),
        Result(
            name=f"worker's memory, {scale.many:,} wait",
            unit="MB, peak",
            postroom=max(memory),
            runs=tuple(memory),
            target=MEMORY_TARGET,
        ),
    ]
