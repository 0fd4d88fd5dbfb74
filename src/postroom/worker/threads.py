"""Threads for sync handlers, and the only way there is to end one."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Interrupted(BaseException):
    """Raised inside a handler's thread to end it: its time is up, or it was cancelled.

    Python delivers it when the thread next runs Python code: a thread that waits in a C call
    (``time.sleep``, a socket) goes on until that call returns.
    """


_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Interruptible:
    """Runs a function so that another thread can end it with :class:`Interrupted`, and nothing after it."""

    __slots__ = ("_mutex", "_thread")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._thread: int | None = None

    def run(self, function: Callable[[], None]) -> None:
        """Raises ``Interrupted`` if the exception struck outside of ``function``'s own handling."""
        try:
            try:
                with self._mutex:
                    self._thread = threading.get_ident()
                function()
            finally:
                self._disarm()
        except Interrupted:
            # It can strike between the end of the function and the disarming; after this it cannot.
            self._disarm()
            raise

    def interrupt(self) -> None:
        """End the function if it is running."""
        with self._mutex:
            if self._thread is not None:
                _raise_in_thread(ctypes.c_ulong(self._thread), ctypes.py_object(Interrupted))

    def _disarm(self) -> None:
        with self._mutex:
            if self._thread is not None:
                _raise_in_thread(ctypes.c_ulong(self._thread), None)
            self._thread = None


class ThreadPool:
    """Up to ``limit`` daemon threads, started as they are needed and kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count = 0
        self._idle = threading.Semaphore(0)

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job``, which must not raise, in some thread. Called from one thread only."""
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and self._count < self._limit:
            self._count += 1
            threading.Thread(target=self._work, name=f"postroom-handler-{self._count}", daemon=True).start()

    def close(self) -> None:
        """Let idle threads end. Busy ones end with their handler, or with the process."""
        for _ in range(self._count):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._idle.release()
