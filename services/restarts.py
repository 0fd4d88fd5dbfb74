"""Lets another program restart a server of this one: by a shell command that asks, and a thread that does it."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from types import TracebackType

from services.base import Server

_LOOK = 0.05


class Restarter:
    """A context manager. Each ``command`` kills the server, starts it again, and returns once it answers."""

    def __init__(self, server: Server, folder: Path) -> None:
        """``folder``: exists."""
        self._server = server
        self._request = folder / "restart"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="restarter")
        self.count = 0
        """Restarts so far."""

    @property
    def command(self) -> str:
        file = shlex.quote(str(self._request))
        return f"touch {file} && while test -e {file}; do sleep {_LOOK}; done"

    def __enter__(self) -> Restarter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._over.wait(_LOOK):
            if self._request.exists():
                self._server.restart()
                self.count += 1
                self._request.unlink()
