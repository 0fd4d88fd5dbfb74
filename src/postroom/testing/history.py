"""What was done to a broker and what it answered: an append-only record, also across processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

Operation = Literal[
    "publish", "deliver", "ack", "retry", "release", "dead", "cancel", "extend", "crash", "redrive",
    "start", "end", "freeze", "cut", "restart", "stall",
]  # fmt: skip
"""The second line: of a handler, and what is done to processes and brokers from outside."""
Result = Literal["invoke", "ok", "fail", "info"]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a history."""

    t: float
    """Seconds, by one clock for the whole history."""
    op: Operation
    id: str
    """Of the message; for ``crash``, of the consumer."""
    sub: str = ""
    """The subscription; empty for ``publish``, which concerns all."""
    attempt: int = 0
    consumer: str = ""
    """Who holds, or held, the delivery."""
    outcome: Result = "ok"
    """``invoke``: about to be done. ``info``: nobody knows whether it took effect."""
    asked: float | None = None
    """For ``deliver``, when it was asked for: a frozen process hears late of what it was given long ago."""
    until: float | None = None
    """When the lease ends, for ``deliver`` and ``extend``."""
    suspect: bool = False
    """For ``deliver``: who held it before has died, so that it is to run apart."""
    counted: bool = False
    """For ``crash``: what the consumer held counts as failed."""
    key: str | None = None
    digest: str = ""
    """Of body and headers, for ``publish`` and ``deliver``."""
    message: str = ""
    """Of the message, where ``id`` is a name given to it before it had one."""


class History:
    """Events in the order they were noted; with a ``path``, each is in the file before ``note`` returns.

    ``sync``: also on the disk, so that it outlives the machine and not only the process.
    """

    def __init__(self, path: Path | None = None, *, sync: bool = True) -> None:
        self.events: list[Event] = []
        self._sync = sync
        self._file = None if path is None else open(path, "ab", buffering=0)  # noqa: SIM115

    def note(self, event: Event) -> None:
        self.events.append(event)
        if self._file is not None:
            # One write a line, so that processes may share a file, and a killed one leaves whole lines.
            self._file.write(msgspec.json.encode(event) + b"\n")
            if self._sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


def load(paths: Iterable[Path]) -> History:
    """One history out of the files of several processes, by time. A last line cut off by a kill is left out."""
    merged = History()
    for path in paths:
        whole_lines, _, _ = path.read_bytes().rpartition(b"\n")
        merged.events += [msgspec.json.decode(line, type=Event) for line in whole_lines.splitlines() if line]
    merged.events.sort(key=lambda event: event.t)
    return merged
