"""A private RabbitMQ: one node from its Debian package, with an Erlang port mapper of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from services import debian
from services.base import Server, ServiceMissing, accepts, free_port, is_alive, require, wait_until

# The programs in /usr/sbin change to the user rabbitmq first; these do not.
PROGRAMS = Path("/usr/lib/rabbitmq/bin")

_CONFIGURATION = """
listeners.tcp.1 = 127.0.0.1:{port}
loopback_users = none
disk_free_limit.absolute = 50MB
"""


class RabbitMQServer(Server):
    """``settings``: further lines of ``rabbitmq.conf``, for what a test needs."""

    name = "rabbitmq"

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self._settings = settings or {}
        self._ports = {"distribution": free_port(), "mapper": free_port()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    @property
    def environment(self) -> dict[str, str]:
        folder = self.folder
        return os.environ | {
            # Where the secret is kept that nodes and tools share.
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"postroom{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_CRASH_DUMP": str(folder / "erl_crash.dump"),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._ports["mapper"]),
        }

    def start(self) -> None:
        program = self._program("rabbitmq-server")
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} = {value}" for name, value in self._settings.items()]
        (self.folder / "rabbitmq.conf").write_text("\n".join([_CONFIGURATION.format(port=self.port), *lines, ""]))
        (self.folder / "enabled_plugins").write_text("[].\n")
        log = self.folder / "server.log"
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                program, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        wait_until(lambda: self._is_up(log), 60.0, f"rabbitmq to start; see {log}")

    def control(self, *arguments: str) -> str:
        """The output of ``rabbitmqctl`` with these arguments."""
        done = subprocess.run(
            [*self._program("rabbitmqctl"), "--quiet", *arguments],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def _program(self, name: str) -> list[str]:
        """The beginning of a command line."""
        return [require(str(PROGRAMS / name), "rabbitmq-server")]

    def _is_up(self, log: Path) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServiceMissing(f"rabbitmq did not start: {log.read_text(errors='replace')[-2000:]}")
        return b"Starting broker... completed" in log.read_bytes() and accepts(self.port)

    def kill(self) -> None:
        super().kill()
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                # The shell around it, and whatever it has started for itself.
                for number in (signal.SIGCONT, signal.SIGKILL):
                    os.killpg(self._process.pid, number)
                self._process.wait()
            self._stop_mapper()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stop_mapper(self) -> None:
        """The port mapper is a daemon that outlives its nodes; this one is ours alone, known by its port."""
        port = str(self._ports["mapper"])
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = (folder / "environ").read_bytes().split(b"\0")
                name = (folder / "comm").read_text().strip()
            except OSError:
                continue
            if name == "epmd" and f"ERL_EPMD_PORT={port}".encode() in values:
                pid = int(folder.name)
                os.kill(pid, signal.SIGKILL)
                wait_until(partial(_is_dead, pid), 10.0, "the port mapper to end")


class RabbitMQ4Server(RabbitMQServer):
    """Of a newer Debian."""

    name = "rabbitmq4"

    def _program(self, name: str) -> list[str]:
        return debian.command(str(PROGRAMS / name), "rabbitmq-server")


def _is_dead(pid: int) -> bool:
    return not is_alive(pid)
