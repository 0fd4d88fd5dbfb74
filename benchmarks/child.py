"""Processes that are measured: each runs one function and hands its result back as JSON.

What is measured is a whole process, so every role (a worker, a producer, a floor) has one of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Child:
    """A fresh process that runs ``function(**arguments)``, with ``broker`` as its app's URL."""

    def __init__(
        self, function: Callable[..., Any], *, broker: str = "", python: str = sys.executable, **arguments: Any
    ) -> None:
        command = [python, "-m", "benchmarks.child", function.__module__, function.__name__]
        self._process = subprocess.Popen(
            [*command, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, "POSTROOM_BROKER": broker},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        """The next thing the child has to say."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self._process.args))} ended with {self._process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)

    def ask(self, word: str) -> Any:
        """Say ``word`` and read the answer."""
        self.tell(word)
        return self.read()

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """What the function returned, once the process has ended."""
        value = self.read()
        if self._process.wait() != 0:
            raise RuntimeError(f"a measured process ended with {self._process.returncode}")
        return value

    def kill(self) -> None:
        """End the process; nothing happens if it has ended."""
        self._process.kill()
        self._process.wait()


def run(function: Callable[..., Any], **arguments: Any) -> Any:
    """The result of ``function(**arguments)`` in a fresh process; arguments as for :class:`Child`."""
    return Child(function, **arguments).result()


def run_together(children: list[Child]) -> list[Any]:
    """Let children that wait in :func:`await_go` start at once. Returns their results."""
    for child in children:
        child.read()
    for child in children:
        child.tell("go")
    return [child.result() for child in children]


def say(value: Any) -> None:
    """In a child: tell the parent."""
    print(json.dumps(value), flush=True)


def await_go() -> None:
    """In a child: all is imported and open; wait until the others are ready too."""
    say("ready")
    sys.stdin.readline()


def cpu_seconds() -> float:
    """User and system time of this process so far, all its threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_memory() -> float:
    """The most memory (resident set) this process ever had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss is inherited from the parent through fork and exec; VmHWM begins anew.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024


def main() -> None:
    module, function, arguments = sys.argv[1:4]
    say(getattr(importlib.import_module(module), function)(**json.loads(arguments)))


if __name__ == "__main__":
    main()
