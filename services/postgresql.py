"""A private PostgreSQL and a PgBouncer before it, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from services import debian
from services.base import Server, ServiceMissing, accepts, install_package, is_alive, require, wait_until
from services.certificates import Certificate

_USER = "postgres"
"""The server refuses to run as root."""
_GUARDED = f"""
host all {_USER} 127.0.0.1/32 trust
hostssl all all 127.0.0.1/32 scram-sha-256
"""
_POOLER = """
[databases]
* = host=127.0.0.1 port={server} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
min_pool_size = 2
default_pool_size = 2
server_round_robin = 1
"""
"""Each transaction on another connection than the one before: what depends on a session fails at once."""


class PostgreSQLServer(Server):
    """Trusts everybody on the loopback interface; the user is ``postgres``."""

    name = "postgresql"

    def __init__(self, folder: Path, *, certificate: Certificate | None = None) -> None:
        """``certificate``: offer TLS, and let nobody but ``postgres`` in without it and a password."""
        # Not in the folder of a test: pytest shuts those to all but itself, and root's server is another user's.
        super().__init__(Path(tempfile.mkdtemp(prefix="postroom-postgresql-")))
        self._certificate = certificate

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def start(self) -> None:
        data = self.folder / "data"
        if not data.exists():
            if os.geteuid() == 0:
                shutil.chown(self.folder, _USER, _USER)
            self._run("initdb", "-D", str(data), "-A", "trust", "-U", _USER, "--no-sync")
            if self._certificate is not None:
                _guard(data, self._certificate)
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self._run("pg_ctl", "-D", str(data), "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        wait_until(lambda: accepts(self.port), 30.0, "postgresql to listen")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._command(program), *arguments]
        # Not captured by a pipe: the server would inherit it, and reading would wait for the server's end.
        with open(os.devnull, "wb") as nothing:
            done = subprocess.run(command, stdout=nothing, stderr=nothing, cwd="/", check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")

    def _command(self, program: str) -> list[str]:
        path = str(_programs() / program)
        return ["runuser", "-u", _USER, "--", path] if os.geteuid() == 0 else [path]

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


class PostgreSQL18Server(PostgreSQLServer):
    """Of a newer Debian."""

    name = "postgresql18"

    def _command(self, program: str) -> list[str]:
        # The user is this machine's, made by its own package.
        _programs()
        become = ["--reuid", _USER, "--regid", _USER, "--init-groups"]
        path = f"/usr/lib/postgresql/18/bin/{program}"
        return [*debian.command("/usr/bin/setpriv", "postgresql-18"), *become, path]


class PgBouncer(Server):
    """Gives each transaction to another of two connections. Knows no passwords; ``stop`` leaves the server alone."""

    name = "pgbouncer"

    def __init__(self, folder: Path, server: int) -> None:
        """``server``: the port of the server, which need not run yet."""
        super().__init__(folder)
        self._server = server
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        assert self._process is not None, "pgbouncer was not started"
        return self._process.pid

    def start(self) -> None:
        command = [require("/usr/sbin/pgbouncer", "pgbouncer"), str(self.folder / "pgbouncer.ini")]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "pgbouncer.ini").write_text(_POOLER.format(server=self._server, user=_USER, port=self.port))
        if os.geteuid() == 0:
            command += ["-u", _USER]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: accepts(self.port), 20.0, "pgbouncer to listen")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10.0)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _guard(data: Path, certificate: Certificate) -> None:
    (data / "pg_hba.conf").write_text(_GUARDED)
    with (data / "postgresql.conf").open("a") as settings:
        settings.write("ssl = on\n")
    # Under the names the server looks for, and as its own: it takes no key that others may read.
    for source, name in ((certificate.certificate, "server.crt"), (certificate.key, "server.key")):
        shutil.copy(source, data / name)
        (data / name).chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(data / name, _USER, _USER)


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
