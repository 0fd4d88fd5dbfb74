"""The time line of a run as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from postroom.torture.measure import Bin, Mark, Outcome

_WIDTH, _LEFT, _RIGHT = 960, 84, 16
_HEIGHT, _GAP = 84, 30
_LANE = 18
COLORS = {"kill": "#c0392b", "freeze": "#2471a3", "stall": "#7fb3d5", "cut": "#b9770e", "restart": "#7d3c98"}


class _Scale:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def x(self, at: float) -> float:
        return round(_LEFT + max(0.0, min(at, self.seconds)) / self.seconds * (_WIDTH - _LEFT - _RIGHT), 1)


def timeline(outcome: Outcome) -> str:
    """An SVG element: faults by process above, then curves, all on one axis of time."""
    bins = outcome.timeline
    step = bins[1].at - bins[0].at
    scale = _Scale(bins[-1].at + step)
    lanes = sorted({mark.target.partition(".")[0] for mark in outcome.marks})
    top = 24 + len(lanes) * _LANE
    parts = [_lanes(outcome.marks, lanes, scale)]
    rate = 1 / step
    curves: list[tuple[str, str, Callable[[Bin], float]]] = [
        ("confirmed a second", "#1e8449", lambda each: each.sent * rate),
        ("handled a second", "#1a5276", lambda each: each.handled * rate),
        ("running", "#6c3483", lambda each: each.in_flight),
        ("started again", "#c0392b", lambda each: each.again),
    ]
    for title, color, value in curves:
        parts.append(_curve(title, color, [value(each) for each in bins], bins, scale, top))
        top += _HEIGHT + _GAP
    parts += [_end_of_harm(outcome.seconds, scale, top), _axis(scale, top)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 24}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11"><title>Time line</title>{"".join(parts)}</svg>'
    )


def _lanes(marks: Sequence[Mark], lanes: Sequence[str], scale: _Scale) -> str:
    parts = []
    for number, lane in enumerate(lanes):
        y = 14 + number * _LANE
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" fill="currentColor">{escape(lane)}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" opacity="0.12"/>'
        )
    for mark in marks:
        y = 14 + lanes.index(mark.target.partition(".")[0]) * _LANE
        x, color = scale.x(mark.at), COLORS[mark.kind]
        width = max(scale.x(mark.until) - x, 4)
        told = escape(f"{mark.kind} {mark.target} at {mark.at:.2f} s")
        parts.append(
            f'<rect x="{x}" y="{y - 6}" width="{width:.1f}" height="12" rx="2" fill="{color}">'
            f"<title>{told}</title></rect>"
        )
    return "".join(parts)


def _curve(title: str, color: str, values: Sequence[float], bins: Sequence[Bin], scale: _Scale, top: int) -> str:
    highest = max(max(values), 1e-9)
    bottom = top + _HEIGHT
    points = " ".join(
        f"{scale.x(each.at)},{bottom - value / highest * (_HEIGHT - 14):.1f}"
        for each, value in zip(bins, values, strict=True)
    )
    first, last = scale.x(bins[0].at), scale.x(bins[-1].at)
    return (
        f'<text x="{_LEFT}" y="{top + 4}" fill="{color}" font-weight="600">{escape(title)}</text>'
        f'<text x="{_LEFT - 6}" y="{top + 18}" text-anchor="end" fill="currentColor">{_number(max(values))}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end" fill="currentColor">0</text>'
        f'<polygon points="{first},{bottom} {points} {last},{bottom}" fill="{color}" opacity="0.18"/>'
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}" stroke="currentColor" opacity="0.3"/>'
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _end_of_harm(seconds: float, scale: _Scale, bottom: int) -> str:
    x = scale.x(seconds)
    return f'<line x1="{x}" x2="{x}" y1="6" y2="{bottom}" stroke="currentColor" stroke-dasharray="3 3" opacity="0.5"/>'


def _axis(scale: _Scale, y: int) -> str:
    step = next(step for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600) if scale.seconds / step <= 14)
    return "".join(
        f'<text x="{scale.x(at)}" y="{y}" text-anchor="middle" fill="currentColor">{at} s</text>'
        for at in range(0, int(scale.seconds) + 1, step)
    )
