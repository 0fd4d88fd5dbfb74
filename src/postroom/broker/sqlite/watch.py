"""Noticing that another process has committed, without asking all the time."""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from postroom.errors import BrokerUnavailable

_IN_MODIFY = 0x2
POLL = 0.02
"""Seconds between looks where changes of a file cannot be watched."""
_LOOKS = (*[0.001] * 10, *[0.005] * 40)
"""Pauses between looks after the log was written to: the commit it belongs to may still wait for the disk."""


class Watch:
    """Calls ``changed()`` on the loop soon after another process has committed something.

    Two files are watched, by inotify on Linux and kqueue on macOS and BSD: the bell, rung after a commit by
    whoever publishes through a broker, and the log, written to by transactions of users' own connections.
    Elsewhere, or where the kernel's watches are used up, it polls.
    """

    def __init__(
        self, bell: Path, log: Path, changed: Callable[[], None], wanted: Callable[[], bool], version: Callable[[], int]
    ) -> None:
        """``wanted()``: whether anybody waits. ``version()``: a number that grows with others' commits;
        it may raise ``BrokerUnavailable``."""
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._wanted = wanted
        self._version = version
        self._seen = version()
        self._looking: asyncio.TimerHandle | None = None
        self._closers: list[Callable[[], object]] = []
        if not (self._watch(bell, changed) and self._watch(log, self._look_soon)):
            self._closers.append(self._loop.create_task(self._keep_polling()).cancel)

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for close in self._closers:
            close()
        self._closers.clear()

    def _look_soon(self, step: int = 0) -> None:
        """Look a few times, until something was committed or nothing more is to be expected."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if self._closers and self._wanted() and not self._has_changed() and step < len(_LOOKS):
            self._looking = self._loop.call_later(_LOOKS[step], self._look_soon, step + 1)

    def _has_changed(self) -> bool:
        try:
            seen, self._seen = self._seen, self._version()
        except BrokerUnavailable:
            # Whoever looks now is told what is wrong; and this goes on watching, as it may pass.
            self._changed()
            return True
        if seen != self._seen:
            self._changed()
        return seen != self._seen

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            if self._wanted():
                self._has_changed()

    def _watch(self, path: Path, notice: Callable[[], None]) -> bool:
        if sys.platform.startswith("linux"):
            return self._watch_by_inotify(path, notice)
        return hasattr(select, "kqueue") and self._watch_by_kqueue(path, notice)

    def _watch_by_inotify(self, path: Path, notice: Callable[[], None]) -> bool:
        library = ctypes.CDLL(None, use_errno=True)
        descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            return False
        if library.inotify_add_watch(descriptor, os.fsencode(path), _IN_MODIFY) < 0:
            os.close(descriptor)
            return False

        def ready() -> None:
            os.read(descriptor, 64 * 1024)
            notice()

        self._loop.add_reader(descriptor, ready)
        self._closers += [lambda: self._loop.remove_reader(descriptor), lambda: os.close(descriptor)]
        return True

    def _watch_by_kqueue(self, path: Path, notice: Callable[[], None]) -> bool:
        if sys.platform == "linux":
            return False
        queue = select.kqueue()
        file = os.open(path, os.O_RDONLY)
        flags = select.KQ_EV_ADD | select.KQ_EV_CLEAR
        event = select.kevent(file, select.KQ_FILTER_VNODE, flags, select.KQ_NOTE_WRITE | select.KQ_NOTE_EXTEND)
        queue.control([event], 0)

        def ready() -> None:
            queue.control(None, 16, 0)
            notice()

        self._loop.add_reader(queue.fileno(), ready)
        self._closers += [lambda: self._loop.remove_reader(queue.fileno()), queue.close, lambda: os.close(file)]
        return True
