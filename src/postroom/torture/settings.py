"""What each process is told: in a file, but for URLs, which may hold passwords and come by the environment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from postroom.errors import ConfigurationError
from postroom.testing.history import Event, History
from postroom.torture.plan import Plan

FOLDER = "POSTROOM_TORTURE"
ACTOR = "POSTROOM_TORTURE_ACTOR"
EFFECTS = "POSTROOM_TORTURE_EFFECTS"
BEGIN = "begin"
"""The file that holds the time of the beginning."""
_LOOK = 0.05


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    plan: Plan
    run: str
    """Begins the names of all queues and subscriptions, so that a run meets only its own."""
    plant: str | None = None

    def save(self, folder: Path) -> None:
        (folder / "settings.json").write_bytes(msgspec.json.encode(self))


class Place:
    """The folder of a run, seen from one of its processes."""

    def __init__(self) -> None:
        """Raises ``ConfigurationError`` outside a run."""
        if FOLDER not in os.environ:
            raise ConfigurationError("this is started by `postroom torture` only")
        self.folder = Path(os.environ[FOLDER])
        self.settings = msgspec.json.decode((self.folder / "settings.json").read_bytes(), type=Settings)
        self.actor = os.environ.get(ACTOR, "conductor")
        """This process, or the worker it is a child of: name and generation, as ``worker-2.1``."""
        self.effects = os.environ[EFFECTS]
        self._history: History | None = None

    def tell_ready(self) -> None:
        """This process is up; a killed one that comes again says so again."""
        (self.folder / "ready" / self.actor.partition(".")[0]).touch()

    def wait_for_begin(self) -> float:
        """The beginning in monotonic seconds, one clock for all processes of a machine, once all are ready."""
        file = self.folder / BEGIN
        while not file.exists():
            time.sleep(_LOOK)
        return float(file.read_text())

    def note(self, event: Event) -> None:
        """Into the file of this process, which is made with its first line."""
        if self._history is None:
            self._history = history_file(self.folder, self.actor)
        self._history.note(event)


def history_file(folder: Path, actor: str) -> History:
    # Not synced: the run ends with the machine, and killed processes leave whole lines in the page cache.
    return History(folder / "history" / f"{actor}.{os.getpid()}.jsonl", sync=False)
