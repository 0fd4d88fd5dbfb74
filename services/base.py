"""A private server for tests and development: real, on a free loopback port, in a folder of its own."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = Path(__file__).parent.parent / ".services"
"""What is downloaded once and used by every run: archives, virtual environments. Not under version control."""

_NEVER_OUTGOING = (20_000, 32_768)
"""Ports below those of outgoing connections: Linux begins with 32,768 (ip(7), ``ip_local_port_range``), macOS later."""


class ServiceMissing(Exception):
    """The server cannot be had here: not installed, and not installable."""


class Server(ABC):
    """Started by the constructor's caller with ``start``; ``stop`` leaves nothing behind."""

    name: str
    """As in ``POSTROOM_TEST_<NAME>_URL``, which names a server to be used instead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()

    @property
    @abstractmethod
    def url(self) -> str:
        """What an app is given."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process that is the server itself, not a shell around it."""

    @abstractmethod
    def start(self) -> None:
        """Start on the same folder and port as before. Returns when it answers. Raises ``ServiceMissing``."""

    @abstractmethod
    def stop(self) -> None:
        """Stop it, if it runs, and remove its folder."""

    def kill(self) -> None:
        """As power would fail for it: SIGKILL, and wait until it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), 10.0, f"{self.name} to die")

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def free_port() -> int:
    """A loopback port that nothing listened on a moment ago.

    Not one of those that Linux and macOS give to outgoing connections: a client that tries again while its server is
    down could be given that server's own port, and be connected with itself; the server would not get it back.
    """
    while True:
        port = random.randrange(*_NEVER_OUTGOING)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until it holds. Raises ``TimeoutError`` that names ``what``."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def require(program: str, package: str) -> str:
    """The path of a program, installed from its Debian package if need be. Raises ``ServiceMissing``."""
    found = shutil.which(program) or (program if os.access(program, os.X_OK) else None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install_package(package)
        found = shutil.which(program) or (program if os.access(program, os.X_OK) else None)
    if found is None:
        raise ServiceMissing(f"{program} is missing; install the package {package}")
    return found


def install_package(package: str) -> None:
    """Install a Debian package without starting its system service. Raises ``ServiceMissing``."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    command = ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", package]
    with installing():
        for attempt in (["apt-get", "update", "-qq"], command):
            done = subprocess.run(attempt, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceMissing(f"cannot install {package}: {done.stderr.strip()[-500:]}")


@contextmanager
def installing() -> Iterator[None]:
    """Test processes run side by side: one at a time, as apt-get does not wait for another that reads the lists."""
    TOOLS.mkdir(exist_ok=True)
    with open(TOOLS / "packages.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
