"""The real processes of the demo: started, watched, and ended without leaving one behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_PATIENCE = 10.0
"""Seconds for a graceful stop before the process is killed."""


class DemoFailed(Exception):
    """A step did not come out as it must; the text says which and how."""


class Process:
    """One ``postroom …`` command with its log."""

    def __init__(self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        self.command = " ".join(("postroom", *arguments))
        self.log = log
        self._name = arguments[0]
        self._file: BinaryIO = open(log, "wb")  # noqa: SIM115 -- the process writes to it for as long as it runs
        self._process = subprocess.Popen(
            [sys.executable, "-m", "postroom.demo.leash", *arguments],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal must reach only the demo, which then ends its processes in order.
            start_new_session=True,
        )

    def must_run(self) -> None:
        """Raises ``DemoFailed`` if the process has ended by itself."""
        code = self._process.poll()
        if code is not None:
            raise DemoFailed(f"`{self.command}` ended with exit code {code}")

    def tail(self, lines: int = 12) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Until it has ended; at the deadline (monotonic) it is killed."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Its whole session, so that a supervisor takes its workers along.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._file.close()


class Processes:
    """All processes of one demo; a context manager that ends them, whatever happens."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        """``logs``: the directory for their logs."""
        self._logs, self._environment = logs, environment
        self._all: list[Process] = []

    def __enter__(self) -> Processes:
        # Ended from outside, the demo must still end its own processes: so leave in good order.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *arguments: str) -> Process:
        """Start ``postroom`` with these arguments."""
        log = self._logs / f"{arguments[0]}.log"
        process = Process(arguments, log=log, environment=self._environment)
        self._all.append(process)
        return process

    def must_run(self) -> None:
        """Raises ``DemoFailed`` if one has ended."""
        for process in self._all:
            process.must_run()

    def tails(self) -> str:
        """The ends of all logs, for a failure's report."""
        return "\n".join(f"--- {process.command}\n{process.tail()}" for process in self._all)

    def stop(self) -> None:
        """End all gracefully, and with force after a while."""
        # The demo is over: neither a second Ctrl-C nor a closed terminal may break off the cleaning up.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for process in self._all:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in self._all:
            process.wait(deadline)
        self._all.clear()


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
