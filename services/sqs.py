"""Private emulators of Amazon SQS and SNS: MiniStack, moto for a second opinion, and ElasticMQ for what only it has.

Those in Python have their own virtual environments, as their pins clash with those of the client.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from http.client import HTTPConnection
from pathlib import Path

from services.base import TOOLS, Server, ServiceMissing, is_alive, wait_until
from services.java import fetched, java

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
"""What a client needs in its environment; the emulators take any."""

REGION = "eu-west-1"


class _Emulator(Server):
    name = "sqs"
    package: str

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"sqs://{REGION}?endpoint_url={self.endpoint_url}"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.package} was not started"
        return self._process.pid

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _environment(self) -> dict[str, str]:
        return {}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=os.environ | CREDENTIALS | self._environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(self._is_up, 60.0, f"{self.package} to start; see {self.folder}/server.log")

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServiceMissing(f"{self.package} did not start; see {self.folder}/server.log")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def kill(self) -> None:
        """Gone, but for its messages: Amazon loses none, and an emulator has them only in its memory.

        So it gets SIGTERM, at which MiniStack writes them down. Requests under way see their connection break.
        """
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            if is_alive(self._process.pid):
                self.resume()
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class SQSServer(_Emulator):
    """MiniStack."""

    package = "ministack"

    def _command(self) -> list[str]:
        return [_installed(self.package, "ministack")]

    def _environment(self) -> dict[str, str]:
        return {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self.port),
            "SERVICES": "sqs,sns,sts",
            "PERSIST_STATE": "1",
            "STATE_DIR": str(self.folder / "state"),
            "MINISTACK_REGION": REGION,
            "LOG_LEVEL": "WARNING",
        }


class MotoServer(_Emulator):
    """moto."""

    package = "moto[server]"

    def _command(self) -> list[str]:
        return [_installed(self.package, "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]


class ElasticMQServer(_Emulator):
    """ElasticMQ: SQS without SNS. Of the three it alone has the tasks that move messages (StartMessageMoveTask)."""

    package = "elasticmq"

    def _command(self) -> list[str]:
        libraries = fetched(f"elasticmq-{_ELASTICMQ}", [f"org.elasticmq:elasticmq-server_2.13:{_ELASTICMQ}"])
        configuration = self.folder / "elasticmq.conf"
        configuration.write_text(_ELASTICMQ_CONFIGURATION.format(port=self.port, region=REGION))
        return [*java(libraries, f"-Dconfig.file={configuration}", memory=256), "org.elasticmq.server.Main"]


_ELASTICMQ = "1.6.9"
_ELASTICMQ_CONFIGURATION = """
include classpath("application.conf")
node-address {{ protocol = http, host = "127.0.0.1", port = {port}, context-path = "" }}
rest-sqs {{ enabled = true, bind-port = {port}, bind-hostname = "127.0.0.1", sqs-limits = strict }}
rest-stats {{ enabled = false }}
aws {{ region = {region}, accountId = 000000000000 }}
"""


def _installed(package: str, program: str) -> str:
    """The path of the emulator's program, installed once. Raises ``ServiceMissing``."""
    folder = TOOLS / package.partition("[")[0]
    found = folder / "bin" / program
    if found.exists():
        return str(found)
    TOOLS.mkdir(exist_ok=True)
    with open(TOOLS / f"{folder.name}.lock", "w") as lock:
        # Two runs may install at once, and a virtual environment cannot be moved into its place.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                raise ServiceMissing(f"cannot install {package}: {done.stderr.strip()[-500:]}")
    return str(found)


if __name__ == "__main__":
    server = SQSServer(Path(tempfile.mkdtemp(prefix="postroom-sqs-")))
    server.start()
    print(server.url, *(f"{name}={value}" for name, value in CREDENTIALS.items()), flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.stop()
