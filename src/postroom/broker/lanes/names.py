"""What lanes are called, and how a URL asks for them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from postroom.errors import ConfigurationError

OPTION = "priorities"

_LANE = re.compile(r"(.+)\.priority-([1-9])")


def lane_of(queue: str, level: int) -> str:
    """The name of a queue's lane; for level 0 the queue's own."""
    return f"{queue}.priority-{level}" if level else queue


def parts_of(name: str) -> tuple[str, int]:
    """The queue to which a lane belongs, and its level; of any other name itself, and 0."""
    match = _LANE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def take_levels(url: str) -> tuple[str, frozenset[int]]:
    """The URL without the option ``priorities``, and its levels; none if it has no such option.

    Raises ``ConfigurationError`` that shows nothing of the URL but this option.
    """
    address, _, query = url.partition("?")
    asked = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == OPTION]
    if not asked:
        return url, frozenset()
    if len(asked) > 1 or not re.fullmatch(r"[1-9](?:,[1-9])*", asked[0]):
        raise ConfigurationError(
            f"broker URL: {OPTION}={asked[-1]!r}: the priorities that are kept apart, each 1 to 9, as {OPTION}=5,9"
        )
    # The others stay as they were written.
    rest = "&".join(part for part in query.split("&") if part.partition("=")[0] != OPTION)
    return f"{address}?{rest}" if rest else address, frozenset(int(level) for level in asked[0].split(","))
