"""The gateway as it is run: real processes, real sockets, a real worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.conftest import wait_until

APP = """
import threading, time
from postroom import INJECTED, App, Context

app = App()

@app.task(queue="work")
def double(x: int) -> int:
    return 2 * x

@app.task(queue="work")
def steps(ctx: Context = INJECTED) -> str:
    for step in range(1, 4):
        ctx.progress(step / 4, f"step {step}")
        time.sleep(0.6)
    return "done"
"""


@dataclass
class Place:
    """A folder with an app, and what runs on it."""

    folder: Path

    @property
    def broker(self) -> str:
        return f"sqlite:///{self.folder}/postroom.db"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        # Its output goes to a file: a pipe that nobody reads would stop it.
        with open(self.folder / f"{arguments[0]}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "postroom", *arguments],
                cwd=self.folder,
                env={**os.environ, "POSTROOM_BROKER": self.broker, **environment},
                stdout=log,
                stderr=log,
            )

    @contextmanager
    def serving(self, **environment: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
        port = free_port()
        process = self.start("serve", "shop:app", "--port", str(port), **environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=40) as client:
                wait_until(lambda: ready(client), "the gateway answers", 20)
                yield client, process
        finally:
            end(process)

    @contextmanager
    def working(self) -> Iterator[None]:
        process = self.start("worker", "shop:app")
        try:
            yield
        finally:
            end(process)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "shop.py").write_text(APP)
    return Place(tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(20)
    finally:
        process.kill()
        process.wait()


def test_hand_in_wait_ask(place: Place) -> None:
    with place.serving() as (client, _), place.working():
        ended = client.post("/v1/tasks/double", json={"x": 21}, headers={"Prefer": "wait=20"})
        assert (ended.status_code, ended.json()["result"]) == (200, 42)
        again = client.get(ended.json()["links"]["self"], headers={"If-None-Match": ended.headers["etag"]})
        assert again.status_code == 304


def test_a_long_poll_answers_at_the_change(place: Place) -> None:
    with place.serving() as (client, _):
        job = client.post("/v1/tasks/double", json={"x": 1}).headers["location"]
        tag = client.get(job).headers["etag"]
        unchanged = client.get(job, headers={"If-None-Match": tag, "Prefer": "wait=1"})
        assert unchanged.status_code == 304
        with place.working():
            changed = client.get(job, headers={"If-None-Match": tag, "Prefer": "wait=30"})
        assert changed.status_code == 200
        assert changed.headers["etag"] != tag


def test_events_until_the_end(place: Place) -> None:
    with place.serving() as (client, _), place.working():
        job = client.post("/v1/tasks/steps", json={}).headers["location"]
        seen, ids = [], []
        with client.stream("GET", f"{job}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line.removeprefix("data: ")))
                elif line.startswith("id: "):
                    ids.append(line.removeprefix("id: "))
        assert seen[-1]["state"] == "succeeded"
        assert {"step 1", "step 2", "step 3"} <= {item["progress"]["text"] for item in seen if "progress" in item}
        assert len(ids) == len(set(ids)) == len(seen)
        over = client.get(f"{job}/events", headers={"Last-Event-ID": ids[-1]})
        assert over.status_code == 204, "so that a browser does not come back for ever"


def test_stopping_answers_those_who_wait(place: Place) -> None:
    with place.serving() as (client, process):
        job = client.post("/v1/tasks/double", json={"x": 1}).headers["location"]
        answers: list[int] = []
        with client.stream("GET", f"{job}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            waiting = threading.Thread(
                target=lambda: answers.append(
                    httpx.get(f"{client.base_url}{job}", headers={"Prefer": "wait=30"}, timeout=40).status_code
                )
            )
            waiting.start()
            wait_until(lambda: connections(client) >= 2, "the long poll is under way")
            process.send_signal(signal.SIGTERM)
            list(lines)
        waiting.join(10)
        assert answers == [200]
        assert process.wait(10) == 0


def connections(client: httpx.Client) -> int:
    """Established ones at the gateway's port, by what the kernel says."""
    port = f":{client.base_url.port:04X} "
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for line in lines if port in f"{line.split()[1]} " and line.split()[3] == "01")


def test_a_token_from_the_environment(place: Place) -> None:
    with place.serving(POSTROOM_TOKEN="s3cret") as (client, _):
        assert client.get("/v1/queues").status_code == 401
        assert client.get("/v1/queues", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert b"s3cret" not in (place.folder / "serve.log").read_bytes()


def test_a_port_in_use(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = place.start("serve", "shop:app", "--port", str(taken.getsockname()[1]))
        assert process.wait(20) != 0
    log = (place.folder / "serve.log").read_text()
    assert "address already in use" in log
    assert "Traceback" not in log
