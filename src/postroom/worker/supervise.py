"""Several worker processes under one parent that starts them, restarts them and passes signals on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger("postroom.supervisor")

SUPERVISOR = "POSTROOM_SUPERVISOR"
"""Environment variable with the process id of the supervisor; a child stops when its parent is another."""

HOPELESS = 78
"""Exit code of a child that finds a mistake in the configuration (``EX_CONFIG`` of sysexits.h)."""

_FIRST_PAUSE = 0.2
_LAST_PAUSE = 30.0
_STEADY = 10.0
"""Seconds a child must have run for its end to be no failed start."""
_WATCH_INTERVAL = 0.5


class Slot:
    """One place for a child process; a child that dies is replaced, ever more slowly while starts fail."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._pause = _FIRST_PAUSE
        self._start_at = 0.0
        self._started_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.is_hopeless = False
        """Its last child found that another start is of no use."""

    def tend(self, now: float) -> None:
        """Start a child if there is none and it is time."""
        if self.process is not None and self.process.poll() is not None:
            self._mourn(self.process.returncode, now)
            self.process = None
        if self.process is None and now >= self._start_at:
            self._started_at = now
            # A process group of its own: Ctrl-C in a terminal must reach the child once, through us.
            environment = {**os.environ, SUPERVISOR: str(os.getpid())}
            self.process = subprocess.Popen(self._command, process_group=0, env=environment)

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _mourn(self, code: int, now: float) -> None:
        self.is_hopeless = code == HOPELESS
        steady = now - self._started_at >= _STEADY
        self._pause = _FIRST_PAUSE if steady else min(self._pause * 2, _LAST_PAUSE)
        self._start_at = now + (0.0 if steady else self._pause)
        if self.is_hopeless:
            logger.error("a worker process could not start; what is wrong stands above")
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        logger.error("a worker process %s; starting another in %.1f s", how, max(0.0, self._start_at - now))


class Supervisor:
    """Runs ``processes`` copies of a command until a signal, or until all have ended by themselves with ``once``."""

    def __init__(
        self, command: Sequence[str], *, processes: int, once: bool = False, watch: Sequence[Path] = ()
    ) -> None:
        """``once``: a child that ends with exit code 0 has done its work and is not replaced (draining).
        ``watch``: directories whose Python files restart all children when they change."""
        self._slots = [Slot(command) for _ in range(processes)]
        self._once = once
        self._watch = watch
        self._wake = threading.Event()
        self._signals: list[int] = []

    def run(self) -> int:
        """To be called in the main thread. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        changed = _Changes(self._watch).any if self._watch else _never
        while self._slots and not self._signals:
            if changed():
                logger.info("source files have changed; restarting the workers")
                self._restart()
            now = time.monotonic()
            for slot in self._slots:
                slot.tend(now)
            if not self._watch and all(slot.is_hopeless for slot in self._slots):
                # It would be the same for ever; who edits the sources mends it now.
                self._signals.append(signal.SIGTERM)
                self._stop()
                return 1
            self._wake.wait(_WATCH_INTERVAL if self._watch else 0.1)
            if self._once:
                self._slots = [slot for slot in self._slots if slot.process is None or slot.process.poll() != 0]
        return self._stop()

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.append(number)
        self._wake.set()

    def _stop(self) -> int:
        """Pass every signal on (a second one hurries the children), and wait for all."""
        sent = 0
        while any(slot.process is not None and slot.process.poll() is None for slot in self._slots):
            for _ in self._signals[sent:]:
                sent += 1
                for slot in self._slots:
                    slot.send(signal.SIGTERM)
            self._wake.clear()
            self._wake.wait(0.05)
        return 0

    def _restart(self) -> None:
        for slot in self._slots:
            slot.send(signal.SIGTERM)
        for slot in self._slots:
            if slot.process is not None:
                slot.process.wait()
                slot.process = None


class _Changes:
    """Notices changed Python files by their time of change."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._known = dict(self._stamps())

    def any(self) -> bool:
        """Whether anything has changed since the last call."""
        before, self._known = self._known, dict(self._stamps())
        return before != self._known

    def _stamps(self) -> Iterator[tuple[str, int]]:
        for directory in self._directories:
            for folder, names, files in os.walk(directory):
                names[:] = [name for name in names if not name.startswith((".", "__pycache__", "node_modules"))]
                for name in files:
                    if name.endswith(".py"):
                        path = os.path.join(folder, name)
                        try:
                            yield path, os.stat(path).st_mtime_ns
                        except FileNotFoundError:
                            continue  # Removed between the listing and the look.


def _never() -> bool:
    return False
