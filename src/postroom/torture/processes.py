"""The processes of a run: started, harmed, started again, and ended without leaving one behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from postroom.errors import PostroomError
from postroom.torture.plan import Options, names
from postroom.torture.settings import ACTOR

_PATIENCE = 15.0
"""Seconds for a graceful stop before the process is killed."""
_MOST_ENDED = 100


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has ended by itself."""

    actor: str
    t: float
    """Monotonic seconds."""
    text: str
    """Exit code, and the last lines of its log."""

    @property
    def refused(self) -> bool:
        """Whether it ended in order, with an error for people: no traceback, no signal."""
        return self.text.rpartition("\n")[2].startswith("Error: ")


class Actor:
    """A worker, relay or producer; whenever it is started anew it is of the next generation."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.role = name.partition("-")[0]
        self.generation = 0
        self.start_at = 0.0
        """Monotonic seconds before which it is not started."""
        self.log = folder / f"{name}.log"
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.is_frozen = False

    @property
    def id(self) -> str:
        """As it stands in the history."""
        return f"{self.name}.{self.generation}"

    @property
    def runs(self) -> bool:
        """Alive and not frozen."""
        return self._process is not None and self._process.poll() is None and not self.is_frozen

    @property
    def code(self) -> int | None:
        """The exit code of one that has ended by itself."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        self.generation += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "postroom.torture.actor", self.role],
                env={**self._environment, ACTOR: self.id},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal must reach only the conductor, which then ends its processes in order.
                start_new_session=True,
            )

    def kill(self, *, again_at: float) -> None:
        assert self._process is not None
        self._process.kill()
        self._forget()
        self.start_at = again_at

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)
        self.is_frozen = False

    def cut(self) -> None:
        """Tell it to cut its connections."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"cut\n")
        self._process.stdin.flush()

    def terminate(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Until it has ended; at the deadline (monotonic) it is killed."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._forget()

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _forget(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.wait()
        self._process.stdin.close()
        self._process = None


class Cast:
    """All actors of a run; a context manager that ends them, whatever happens."""

    def __init__(self, options: Options, folder: Path, environment: Mapping[str, str]) -> None:
        every = [
            *names("worker", options.workers), *names("relay", options.relays), *names("producer", options.producers),
        ]  # fmt: skip
        self.actors = {name: Actor(name, folder, environment) for name in every}
        self.ended: list[Ended] = []

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __iter__(self) -> Iterator[Actor]:
        return iter(self.actors.values())

    def tend(self, now: float, note: Callable[[Actor], None]) -> None:
        """Start what does not run and should. ``note`` is told of one that has ended by itself.

        Raises ``PostroomError`` if that goes on and on.
        """
        for actor in self:
            if actor.code is not None and not (actor.role == "producer" and actor.code == 0):
                note(actor)
                text = f"exit code {actor.code}; its last words:\n{actor.tail()}"
                self.ended.append(Ended(actor=actor.id, t=now, text=text))
                if len(self.ended) > _MOST_ENDED:
                    raise PostroomError(f"processes do not stay up: {actor.id}: {text}")
                actor.kill(again_at=now + 1.0)
            if actor.code is None and not actor.runs and not actor.is_frozen and now >= actor.start_at:
                actor.start()

    @property
    def producing(self) -> bool:
        return any(actor.role == "producer" and actor.code is None for actor in self)

    def stop(self) -> None:
        """End all gracefully, and with force after a while."""
        for actor in self:
            actor.terminate()
        deadline = time.monotonic() + _PATIENCE
        for actor in self:
            actor.wait(deadline)
