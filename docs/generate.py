"""Writes the table of what each broker can do into docs/semantics.md, from the brokers' own ``Capabilities``."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import msgspec

from postroom.broker.base import PRIORITIES, Capabilities
from postroom.broker.registry import GROUP

_MEANING = {
    "durability": "A confirmed message survives",
    "shared": "Several processes at once",
    "death_notice": "A killed worker is noticed within",
    "jobs": "Keeps status and results itself",
    "transactional_publish": "Enqueue in your own transaction",
    "delay": "Longest delay",
    "priorities": "Priorities",
    "fifo": "The longer ready first",
    "ordering": "Order by key",
    "patterns": "Subscriptions by topic pattern",
    "filters": "Subscriptions by header",
    "deduplication": "Idempotency keys",
    "unique": "Unique jobs, and replacing them",
    "known_ids": "Knows an id published twice",
    "start_notes": "Charges only what had started",
    "expiry": "Expiry",
    "limits": "Queue limits",
    "exact_stats": "Exact counts",
    "retention": "Late subscriptions and replay",
    "max_message_size": "Largest message of its own",
}
_SURVIVES = {
    "none": "nothing (`none`)",
    "process": "the death of every process (`process`)",
    "fsync": "a power cut (`fsync`)",
    "replicated": "the loss of a machine (`replicated`)",
}
_MARKED = re.compile(r"(<!-- generated: capabilities -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """One row a capability, one column a broker. Raises ``KeyError`` for a capability without a meaning here."""
    # Several schemes, as redis:// and rediss://, may lead to one broker: it is shown under the shortest.
    schemes = {point.value: point.name for point in sorted(entry_points(group=GROUP), key=lambda p: -len(p.name))}
    brokers = {
        point.name: point.load().capabilities
        for point in entry_points(group=GROUP)
        if point.name == schemes[point.value]
    }
    names = sorted(brokers, key=lambda name: (name != "sqlite", name))
    rows = [["capability", "meaning", *(f"`{name}://`" for name in names)], ["---"] * (2 + len(names))]
    for field in msgspec.structs.fields(Capabilities):
        values = [_shown(field.name, getattr(brokers[name], field.name)) for name in names]
        rows.append([f"`{field.name}`", _MEANING[field.name], *values])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def updated(page: str) -> str:
    """The page with the table as it is now. Raises ``ValueError`` if the page has no place for it."""
    if not _MARKED.search(page):
        raise ValueError("the page has no <!-- generated: capabilities --> … <!-- end -->")
    return _MARKED.sub(lambda match: match[1] + table() + match[2], page)


def _shown(name: str, value: object) -> str:
    if name == "durability":
        return _SURVIVES[str(value)]
    if name == "priorities":
        return "1 to 9" if value == PRIORITIES else "with lanes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "any" if name == "delay" else "no limit"
    if name == "death_notice":
        return f"{value:g} s"
    return f"{value:,} bytes" if name == "max_message_size" else f"{value:,} s"


def main() -> None:
    page = Path(__file__).with_name("semantics.md")
    page.write_text(updated(page.read_text()))


if __name__ == "__main__":
    main()
