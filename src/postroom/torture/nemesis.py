"""Does the harm that the plan wants, and notes it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

from postroom.errors import PostroomError
from postroom.testing.history import Event
from postroom.torture.plan import Fault
from postroom.torture.processes import Cast
from postroom.torture.record import BROKER

_RESTART_PATIENCE = 120.0


class Nemesis:
    """Lives in the conductor's loop: ``tick`` does what is due, ``heal`` undoes what can be undone."""

    def __init__(
        self, faults: list[Fault], cast: Cast, *, begin: float, restart: str | None, note: Callable[[Event], None]
    ) -> None:
        """``restart``: a shell command that restarts the broker and returns once it answers."""
        self._due = sorted(faults, key=lambda fault: fault.at)
        self._cast = cast
        self._begin = begin
        self._restart = restart
        self._note = note
        self._thaw: dict[str, float] = {}
        self._restarting: subprocess.Popen[bytes] | None = None
        self._restarted_at = 0.0
        self._no_restart_before = 0.0

    def tick(self, now: float) -> None:
        """Raises ``PostroomError`` if the broker could not be restarted."""
        for name, at in list(self._thaw.items()):
            if now >= at:
                self._cast.actors[name].thaw()
                del self._thaw[name]
        self._look_at_restart(now)
        while self._due and now >= self._begin + self._due[0].at:
            self._do(self._due.pop(0), now)

    def heal(self) -> None:
        """No more harm: thaw, and wait for the broker. Raises ``PostroomError``."""
        self._due.clear()
        for name in list(self._thaw):
            self._cast.actors[name].thaw()
        self._thaw.clear()
        while self._restarting is not None:
            self._look_at_restart(time.monotonic())
            time.sleep(0.05)

    def close(self) -> None:
        """Leave no command running."""
        if self._restarting is not None and self._restarting.poll() is None:
            os.killpg(self._restarting.pid, signal.SIGKILL)
            self._restarting.wait()

    def _do(self, fault: Fault, now: float) -> None:
        if fault.kind == "restart":
            self._begin_restart(now)
            return
        actor = self._cast.actors[fault.target]
        if not actor.runs:
            return  # It is frozen or dead already, or has sent everything.
        if fault.kind == "kill":
            actor.kill(again_at=now + fault.lasts)
            # After it: what the victim noted until then comes before.
            self._note(Event(t=time.monotonic(), op="crash", id=actor.id))
        elif fault.kind == "freeze":
            self._note(Event(t=time.monotonic(), op="freeze", id=actor.id, until=now + fault.lasts))
            actor.freeze()
            self._thaw[actor.name] = now + fault.lasts
        else:
            actor.cut()

    def _begin_restart(self, now: float) -> None:
        if self._restarting is not None or now < self._no_restart_before:
            return
        assert self._restart is not None
        self._restarted_at = now
        self._note(Event(t=now, op="restart", id=BROKER, outcome="invoke"))
        self._restarting = subprocess.Popen(self._restart, shell=True, start_new_session=True)

    def _look_at_restart(self, now: float) -> None:
        if self._restarting is None:
            return
        code = self._restarting.poll()
        if code is None and now < self._restarted_at + _RESTART_PATIENCE:
            return
        if code != 0:
            why = "takes too long" if code is None else f"ended with exit code {code}"
            raise PostroomError(f"--restart: `{self._restart}` {why}; it must restart the broker and return 0")
        self._note(Event(t=self._restarted_at, op="restart", id=BROKER, until=now))
        # As long up as it was down at least: of a broker that is always away nothing can be learned.
        self._no_restart_before = now + (now - self._restarted_at)
        self._restarting = None
