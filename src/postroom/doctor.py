"""What ``postroom doctor`` finds: the words in which every broker reports about its server or file."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    level: Level
    """``warning``: it works, but a promise is weaker or at risk. ``error``: a promise cannot be kept."""
    title: str
    """What was looked at, in a few words, the same at every level: ``free disk space``."""
    detail: str
    """What was found, with numbers and names."""
    remedy: str = ""
    """What to do about it, ready to be typed or set; empty if nothing has to be done."""
