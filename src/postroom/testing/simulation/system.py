"""The operating system as programs see it: clocks, process ids, randomness, files' locks, SQLite connections.

The product asks Python's own modules for these; while a machine is installed they answer for the machine.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from postroom import message
from postroom.broker.sqlite import SQLiteBroker, holders
from postroom.store.outbox import relay
from postroom.testing.simulation.app import LEASE
from postroom.testing.simulation.machine import Machine
from postroom.testing.simulation.sql import Connection

try:
    import fcntl
except ImportError:  # Windows: nobody's death is seen there.
    fcntl = None  # type: ignore[assignment]

_connect = sqlite3.connect


@contextmanager
def installed(machine: Machine, seed: str) -> Iterator[None]:
    """Until left, this thread runs on ``machine``."""
    entropy = Random(f"{seed}/entropy")
    state = random.getstate()
    random.seed(f"{seed}/random")
    with ExitStack() as stack, warnings.catch_warnings():
        # What a dead process was about to do is not done.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        for place, name, replacement in _replacements(machine, entropy):
            stack.enter_context(mock.patch.object(place, name, replacement))
        # Ids made before must not be used here, nor any made here afterwards.
        message._tails.clear()
        try:
            yield
        finally:
            message._tails.clear()
            random.setstate(state)


def _replacements(machine: Machine, entropy: Random) -> list[tuple[Any, str, Any]]:
    real_pid = os.getpid()

    def pid() -> int:
        return machine.current.pid if machine.current is not None else real_pid

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return _open(machine, *args, **options)

    found: list[tuple[Any, str, Any]] = [
        (time, "time", lambda: machine.wall),
        (time, "time_ns", lambda: int(machine.wall * 1e9)),
        (time, "monotonic", lambda: machine.monotonic),
        (os, "getpid", pid),
        (os, "urandom", entropy.randbytes),
        (sqlite3, "connect", connect),
        (sqlite3.dbapi2, "connect", connect),
    ]
    found += [(relay, "LEASE", LEASE), (relay, "_RENEW", LEASE / 3)]
    if hasattr(time, "clock_gettime"):
        # The one clock that is asked for so is the monotonic one.
        found.append((time, "clock_gettime", lambda _: machine.monotonic))
    if fcntl is not None:
        # Locks of ``lockf`` belong to the real process, which is one here; those of ``flock`` to whoever opened the
        # file, as each simulated process does for itself.
        locks = SimpleNamespace(LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB, lockf=fcntl.flock)
        found.append((holders, "fcntl", locks))
    return found


def _open(machine: Machine, *args: Any, **options: Any) -> sqlite3.Connection:
    # Who waits in C for a lock would stop the machine: everybody is told at once, and waits by the simulated clock.
    connection: Connection = _connect(*args, **{**options, "timeout": 0.0, "factory": Connection})
    process = machine.current
    connection.machine, connection.process = machine, process
    connection.create_function("julianday", 1, lambda _: machine.wall / 86_400.0 + 2440587.5)
    if process is not None:
        process.closers.append(connection.abandon)
    return connection


def leave_to_the_system(broker: SQLiteBroker) -> None:
    """What the system does with a broker's files when its process dies: locks and watches end, notes stay."""
    if broker._watch is not None:
        broker._watch.close()
    broker.holders.close(keep_notes=True)
    if broker._bell is not None:
        broker._bell.close()
