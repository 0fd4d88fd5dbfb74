"""The photo service in operation: a gateway, workers, and what they leave behind."""

from __future__ import annotations

import http.client
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from postroom.broker.registry import make_broker
from postroom.demo.client import Answer, Client
from postroom.demo.evidence import Evidence
from postroom.demo.narrator import Narrator
from postroom.demo.place import example
from postroom.demo.processes import DemoFailed, Process, Processes, free_port
from postroom.errors import ConfigurationError

T = TypeVar("T")

_POLL = 0.03
_FINAL = {"succeeded", "dead", "cancelled", "expired"}
_READY = re.compile(r"worker (\d+) works on")


class Service:
    """What the story needs of the running photo service. Methods raise ``DemoFailed``."""

    def __init__(self, root: Path, processes: Processes, client: Client, workers: Process) -> None:
        self.out = root / "out"
        self.uploads = self.out / "uploads"
        self.client = client
        self.evidence = Evidence(self.out)
        self.processes = processes
        self._workers = workers

    def pids(self) -> list[int]:
        """The workers that have reported for work so far, the dead ones too, in that order."""
        return [int(pid) for pid in _READY.findall(self._workers.log.read_text(errors="replace"))]

    def enqueue(self, task: str, arguments: Mapping[str, object]) -> Answer:
        """Hand in a job by its arguments."""
        return self._accepted(self.client.post(f"/v1/tasks/{task}", dict(arguments)))

    def upload(self, name: str, photo: bytes, **fields: object) -> Answer:
        """Hand in a photograph."""
        return self._accepted(self.client.upload("/v1/tasks/make_thumbnail", fields, "photo", name, photo))

    def status(self, job_id: str) -> dict[str, Any]:
        """A job's status as the gateway tells it."""
        answer = self.client.get(f"/v1/jobs/{job_id}")
        if answer.status != 200:
            raise DemoFailed(f"GET /v1/jobs/{job_id}: {answer.status} {answer.body}")
        status: dict[str, Any] = answer.body
        return status

    def ended(self, job_id: str) -> dict[str, Any]:
        """A job's status once it has ended."""
        return self.wait(f"the end of job {job_id}", lambda: _if_final(self.status(job_id)))

    def wait(self, what: str, look: Callable[[], T | None], *, seconds: float = 60.0) -> T:
        """Look until there is something to see, at most so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := look()) is None:
            self.processes.must_run()
            if time.monotonic() > deadline:
                raise DemoFailed(f"waited {seconds:.0f} s for {what}, in vain")
            time.sleep(_POLL)
        return found

    def _accepted(self, answer: Answer) -> Answer:
        if answer.status != 202:
            raise DemoFailed(f"the gateway answered {answer.status} instead of 202: {answer.body}")
        return answer


@contextmanager
def running(narrator: Narrator, *, workers: int, broker: str | None = None) -> Iterator[Service]:
    """A photo service in a temporary directory, up and ready; ended and removed on leaving.

    Raises ``DemoFailed``, with the ends of all logs, also for what fails while it is in use, and
    ``ConfigurationError`` for a broker that several processes cannot use.
    """
    capabilities = make_broker(broker or "sqlite:///demo.db").capabilities
    if not capabilities.shared:
        raise ConfigurationError(f"{broker} lives within one process, and the demo runs several; use sqlite:///file.db")
    with tempfile.TemporaryDirectory(prefix="postroom-demo-") as name:
        root = Path(name).resolve()
        (root / "out").mkdir()
        environment = _environment(broker or f"sqlite:///{root}/postroom.db", root / "out")
        if not capabilities.jobs:
            environment["POSTROOM_STORE"] = f"sqlite:///{root}/jobs.db"
        with Processes(root, environment) as processes:
            try:
                yield _started(narrator, processes, root, workers, environment["POSTROOM_BROKER"])
            except (DemoFailed, OSError, http.client.HTTPException) as error:
                raise DemoFailed(f"{error}\n{processes.tails()}") from error


def _started(narrator: Narrator, processes: Processes, root: Path, workers: int, url: str) -> Service:
    target = f"{example() / 'app.py'}:app"
    port = free_port()
    crew = processes.start("worker", target, "--processes", str(workers), "--concurrency", "1")
    gateway = processes.start("serve", target, "--port", str(port))
    service = Service(root, processes, Client("127.0.0.1", port), crew)
    narrator.heading("A photo service, in real processes")
    narrator.commands(f"export POSTROOM_BROKER={url}", gateway.command, crew.command)
    with narrator.waiting("starting"):
        service.wait("the gateway", lambda: _if_ready(service.client))
        pids = service.wait("the workers", lambda: if_more(service.pids(), workers - 1))
    narrator.check(len(set(pids)) == workers, f"{workers} workers are up: {', '.join(map(str, pids))}", pids)
    return service


def _environment(url: str, out: Path) -> dict[str, str]:
    """Ours, without settings that belong to another app of the user's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POSTROOM_")}
    return {**inherited, "POSTROOM_BROKER": url, "PHOTOS_OUT": str(out)}


def _if_final(status: dict[str, Any]) -> dict[str, Any] | None:
    return status if status["state"] in _FINAL else None


def _if_ready(client: Client) -> bool | None:
    try:
        return client.get("/readyz").status == 200 or None
    except (OSError, http.client.HTTPException):
        return None  # It does not listen yet.


def if_more(pids: list[int], number: int) -> list[int] | None:
    """The list if it has more than ``number`` entries."""
    return pids if len(pids) > number else None
