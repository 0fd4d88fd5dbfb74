"""A private PostgreSQL, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from services.base import Server, ServiceMissing, accepts, install_package, is_alive, wait_until

_USER = "postgres"
"""The server refuses to run as root."""


class PostgreSQLServer(Server):
    """Trusts everybody on the loopback interface; the user is ``postgres``."""

    name = "postgresql"

    def __init__(self, folder: Path) -> None:
        # Not in the folder of a test: pytest shuts those to all but itself, and root's server is another user's.
        super().__init__(Path(tempfile.mkdtemp(prefix="postroom-postgresql-")))

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def start(self) -> None:
        programs = _programs()
        data = self.folder / "data"
        if not data.exists():
            if os.geteuid() == 0:
                shutil.chown(self.folder, _USER, _USER)
            _run(programs / "initdb", "-D", str(data), "-A", "trust", "-U", _USER, "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        _run(programs / "pg_ctl", "-D", str(data), "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        wait_until(lambda: accepts(self.port), 30.0, "postgresql to listen")

    def kill(self) -> None:
        # Its processes share memory: while one of them lives, the server does not start again.
        everyone = [self.pid, *_children(self.pid)]
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, everyone)), 10.0, "postgresql to die")
        # Where nobody collects the dead, the next start would take them for the living.
        for note in (self.folder / "data" / "postmaster.pid", *self.folder.glob(".s.PGSQL.*.lock")):
            note.unlink(missing_ok=True)

    def stop(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists() and is_alive(pid := self.pid):
            # An immediate shutdown (PostgreSQL documentation, 19.5).
            os.kill(pid, signal.SIGQUIT)
            wait_until(lambda: not is_alive(pid), 10.0, "postgresql to stop")
        shutil.rmtree(self.folder, ignore_errors=True)


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _programs() -> Path:
    """The newest version's folder. Raises ``ServiceMissing``."""
    for attempt in range(2):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        if found:
            return found[-1].parent
        if attempt == 0 and os.geteuid() == 0 and shutil.which("apt-get"):
            install_package("postgresql")
    raise ServiceMissing("PostgreSQL is missing; install the package postgresql")


def _run(program: Path, *arguments: str) -> None:
    command = [str(program), *arguments]
    if os.geteuid() == 0:
        command = ["runuser", "-u", _USER, "--", *command]
    # Not captured by a pipe: the server would inherit it, and reading would wait for the server's end.
    with open(os.devnull, "wb") as nothing:
        done = subprocess.run(command, stdout=nothing, stderr=nothing, cwd="/", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
