"""A private Redis or Valkey: from its Debian package, or the program that POSTROOM_REDIS_SERVER names."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from services import debian
from services.base import Server, is_alive, require, wait_until


class RedisServer(Server):
    """Keeps an append-only file, so that what it confirmed is there after a kill.

    ``everysec`` is not enough for that: while a sync of its takes long, the server answers before it has written.
    """

    name = "redis"

    def __init__(self, folder: Path, *, options: Sequence[str] = ()) -> None:
        """``options``: more of the command line, as ``("--maxmemory", "10mb")``."""
        super().__init__(folder)
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "redis was not started"
        return self._process.pid

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [*self._program(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *self._options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers, 60.0, "redis to answer")

    def _program(self) -> list[str]:
        """The beginning of a command line."""
        return [require(os.environ.get("POSTROOM_REDIS_SERVER", "redis-server"), "redis-server")]

    def kill(self) -> None:
        super().kill()
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            if is_alive(self.pid):
                self.resume()
                self._process.terminate()
            self._process.wait(10.0)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self) -> None:
        """Once it has written what it confirmed: while its file is synced it holds back what comes, for 2 s at most."""
        wait_until(self.has_written, 20.0, "redis to write its file")
        super().restart()

    def has_written(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), 5.0) as connection:
            connection.sendall(b"INFO persistence\r\nQUIT\r\n")
            return b"aof_buffer_length:0\r" in b"".join(iter(lambda: connection.recv(4096), b""))

    def _answers(self) -> bool:
        """It loads its file before it answers anything but an error."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.sendall(b"PING\r\n")
                # Where TLS is asked for, that somebody listens is all that can be seen from here.
                return connection.recv(5) in (b"+PONG", b"-NOAU") or "--tls-port" in self._options
        except OSError:
            return False


class Redis8Server(RedisServer):
    """Of a newer Debian."""

    name = "redis8"

    def _program(self) -> list[str]:
        return debian.command("/usr/bin/redis-server", "redis-server")


class ValkeyServer(RedisServer):
    """Of a newer Debian."""

    name = "valkey"

    def _program(self) -> list[str]:
        return debian.command("/usr/bin/valkey-server", "valkey-server")
