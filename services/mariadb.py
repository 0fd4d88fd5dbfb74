"""A private MariaDB, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from services.base import Server, accepts, require, wait_until


class MariaDBServer(Server):
    """The user ``test`` has no password and may do everything in the database ``test``."""

    name = "mariadb"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mysql://test@127.0.0.1:{self.port}/test"

    @property
    def pid(self) -> int:
        assert self._process is not None, "mariadb was not started"
        return self._process.pid

    def start(self) -> None:
        program = require("/usr/sbin/mariadbd", "mariadb-server")
        data = self.folder / "data"
        user = f"--user={'root' if os.geteuid() == 0 else os.environ.get('USER', '')}"
        if not data.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            install = ["mariadb-install-db", f"--datadir={data}", "--auth-root-authentication-method=normal", user]
            subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (self.folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS test;\n"
            "CREATE USER IF NOT EXISTS test@'127.0.0.1';\n"
            "GRANT ALL ON test.* TO test@'127.0.0.1';\n"
        )
        options = {
            "datadir": data,
            "port": self.port,
            "bind-address": "127.0.0.1",
            "skip-name-resolve": 1,
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
            "init-file": self.folder / "init.sql",
        }
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [program, "--no-defaults", user, *(f"--{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: accepts(self.port), 60.0, "mariadb to listen")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)
