"""Writes into docs/semantics.md what each broker can do, from its ``Capabilities``, and how it keeps each promise, from
the table on its page."""

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
_PAGES = {
    "PostgreSQL": "postgresql.md",
    "RabbitMQ": "rabbitmq.md",
    "Kafka": "kafka.md",
    "Redis": "redis.md",
    "SQS": "sqs.md",
}
_DOCS = Path(__file__).parent
_PROMISE = re.compile(r"^\| (C\d+) \| ([^|]+) \| ([^|]*) \| ?([^|]*) ?\|$", re.MULTILINE)
"""Of semantics.md itself: the SQLite broker's."""
_KEPT = re.compile(r"^\| (C\d+(?:, C\d+)*) [^|]+ \| ([^|]*) \| ?([^|]*) ?\|$", re.MULTILINE)
"""Of a broker's page."""
_LINK = re.compile(r"\]\(([^)#:]*)(#[^)]*)?\)")


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


def promises(page: str) -> str:
    """A table for each promise of ``page``, one row a broker. Raises ``KeyError`` if a broker does not tell of one."""
    kept = {name: _kept(file) for name, file in _PAGES.items()}
    parts = []
    for number, title, mechanism, bound in _PROMISE.findall(page):
        rows = [("SQLite", mechanism, bound)]
        rows += [(f"[{name}](brokers/{_PAGES[name]})", *told[number]) for name, told in kept.items()]
        lines = "".join(f"| {name} | {how} | {within.strip()} |\n" for name, how, within in rows)
        parts.append(f"### {number} {title}\n\n| broker | mechanism | bound |\n| --- | --- | --- |\n{lines}")
    return "\n".join(parts)


def updated(page: str) -> str:
    """The page with its tables as they are now. Raises ``ValueError`` if the page has no place for one."""
    for name, text in (("capabilities", table()), ("promises", promises(page))):
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"the page has no <!-- generated: {name} --> … <!-- end -->")
        page = before + begin + text + end + after
    return page


def _kept(file: str) -> dict[str, tuple[str, str]]:
    """Mechanism and bound by promise, as a broker's page has them, with links that lead from semantics.md."""

    def link(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = path or file
        target = target.removeprefix("../") if target.startswith("../") else f"brokers/{target}"
        return f"]({'' if target == 'semantics.md' else target}{anchor})"

    told: dict[str, tuple[str, str]] = {}
    for numbers, mechanism, bound in _KEPT.findall((_DOCS / "brokers" / file).read_text()):
        for number in numbers.split(", "):
            told[number] = (_LINK.sub(link, mechanism), _LINK.sub(link, bound))
    return told


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
    page = _DOCS / "semantics.md"
    page.write_text(updated(page.read_text()))


if __name__ == "__main__":
    main()
