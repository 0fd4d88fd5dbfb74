"""One process of a run: ``python -m postroom.torture.actor worker|relay|producer``. Works until told otherwise.

The conductor holds the other end of standard input: lines are orders, and its end is the end of this process too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from postroom.testing.history import Event
from postroom.torture import connections
from postroom.torture.settings import ACTOR, EFFECTS, Place

CONCURRENCY = 8
_PATIENCE = 10.0
"""Seconds to stop in good order."""
_TICK = 0.1
_SIGNAL_OF_PARENTS_DEATH = 1
"""``PR_SET_PDEATHSIG`` of linux/prctl.h."""


def main(role: str) -> None:
    _die_with_the_conductor()
    place = Place()
    threading.Thread(target=_obey, args=(place,), daemon=True).start()
    threading.Thread(target=_watch_time, args=(place,), daemon=True).start()
    if role == "producer":
        from postroom.torture.producer import Producer

        Producer(os.environ[ACTOR].rpartition(".")[0]).run()
        return
    from postroom.cli.main import main as postroom

    target = "postroom.torture.app:app"
    commands = {
        "worker": ["worker", target, "--child", "--concurrency", str(CONCURRENCY), "--grace", "5"],
        "relay": ["outbox", "relay", target],
    }
    os.environ["POSTROOM_OUTBOX"] = os.environ[EFFECTS]
    sys.argv[:] = ["postroom", *commands[role]]
    postroom()


def _die_with_the_conductor() -> None:
    """Even frozen: nobody is left to thaw it, and it would stay for ever. Other systems than Linux cannot do it."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _obey(place: Place) -> None:
    while order := os.read(0, 1024):
        if b"cut" in order:
            place.note(Event(t=time.monotonic(), op="cut", id=place.actor))
            connections.cut(spared=place.effects)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


def _watch_time(place: Place) -> None:
    """A process that gets no time loses its leases like a frozen one: that must be on record to explain it."""
    allowed = place.settings.plan.options.lease / 3
    last = time.monotonic()
    while True:
        time.sleep(_TICK)
        now = time.monotonic()
        if now - last > allowed:
            place.note(Event(t=last, op="stall", id=place.actor, until=now))
        last = now


if __name__ == "__main__":
    main(sys.argv[1])
