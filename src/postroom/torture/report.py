"""A run as people read it."""

from __future__ import annotations

from postroom.torture.measure import Outcome, Times


def figures(outcome: Outcome) -> list[tuple[str, str]]:
    """Names and numbers."""
    drained = "never" if outcome.drained_after is None else f"{outcome.drained_after:.1f} s"
    return [
        ("broker", outcome.broker),
        ("effects", outcome.effects),
        ("seed", str(outcome.seed)),
        ("under fault", f"{outcome.seconds:g} s"),
        ("faults", ", ".join(f"{count} {kind}" for kind, count in outcome.faults.items()) or "none"),
        ("messages confirmed", f"{outcome.sent:,}"),
        ("outcome unknown to the producer", f"{outcome.unknown:,}"),
        ("handled to the end", f"{outcome.handled:,}"),
        ("dead letters, as planned", f"{outcome.dead:,}"),
        ("started again because of a fault", f"{outcome.again - outcome.unexplained:,}"),
        ("started again without a reason", f"{outcome.unexplained:,}"),
        ("settlements refused to former holders", f"{outcome.refused:,}"),
        ("again after a kill: p50, p99, longest", _told(outcome.redelivery)),
        ("resumed after a cut or restart: p50, p99, longest", _told(outcome.resumed)),
        ("drained after the last harm", drained),
    ]


def _told(times: Times) -> str:
    if times.p50 is None or times.p99 is None or times.longest is None:
        return "did not happen"
    return f"{times.p50:.2f}, {times.p99:.2f}, {times.longest:.2f} s ({times.count})"
