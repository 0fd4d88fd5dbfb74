"""A run as people read it."""

from __future__ import annotations

from collections import Counter
from html import escape

from postroom.torture.check import CHECKS
from postroom.torture.measure import Outcome, Times
from postroom.torture.timeline import COLORS, timeline


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


def page(outcome: Outcome) -> str:
    """A page of its own: it asks for nothing from anywhere."""
    verdict = "No violation" if not outcome.violations else f"{len(outcome.violations)} violations"
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in figures(outcome))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(verdict)} · postroom torture</title>
<style>{_STYLE}</style>
<main>
<h1 class="{"bad" if outcome.violations else "good"}">{escape(verdict)}</h1>
<p>{escape(outcome.broker)} · {outcome.seconds:g} s under fault · {escape(outcome.machine)}</p>
<figure>{timeline(outcome)}
<figcaption>{_legend(outcome)} The dashed line is the end of the harm; what comes after it is the draining.</figcaption>
</figure>
<table>{rows}</table>
<h2>What was looked for</h2>
<table>{_checks(outcome)}</table>
{_violations(outcome)}
<h2>Again</h2>
<pre>{escape(outcome.command)}</pre>
</main>
</html>
"""


def _legend(outcome: Outcome) -> str:
    return "".join(
        f'<span class="key"><i style="background:{COLORS[kind]}"></i>{escape(kind)}</span> ' for kind in outcome.faults
    )


def _checks(outcome: Outcome) -> str:
    counts = Counter(violation.kind for violation in outcome.violations)
    return "".join(
        f'<tr class="{"bad" if counts[kind] else ""}"><th>{escape(text)}</th><td>{counts[kind]}</td></tr>'
        for kind, text in CHECKS.items()
    )


def _violations(outcome: Outcome) -> str:
    if not outcome.violations:
        return ""
    rows = "".join(
        f"<tr><td>{escape(each.kind)}</td><td>{escape(each.token)}</td><td>{escape(each.text)}</td></tr>"
        for each in outcome.violations[:_MOST]
    )
    more = len(outcome.violations) - _MOST
    return f"<h2>Violations</h2><table>{rows}</table>" + (f"<p>… and {more} more</p>" if more > 0 else "")


_MOST = 200
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0; } main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.6rem; } h1.good { color: #1e8449; } .bad { color: #c0392b; }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; } p { margin: .25rem 0 1rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; } figcaption { font-size: .85rem; opacity: .8; }
.key { margin-right: .8rem; } .key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: normal; }
th, td { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; overflow-wrap: anywhere; }
table td:last-child { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; padding: .8rem; background: #8882; border-radius: .3rem; white-space: pre-wrap; }
"""
