"""The gateway: what programs send and what they get, and that a 202 survives its death."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import wait_until, working

from postroom import App, ConfigurationError, JobState, RetryPolicy, Upload
from postroom.gateway import Gateway, serve


def make_app(url: str, folder: Path, **options: Any) -> App:
    app = App(url, uploads=folder / "uploads", **options)

    @app.task
    def add(a: int, b: int = 1) -> int:
        return a + b

    @app.task(queue="files")
    def size(file: Upload, unit: str = "bytes") -> str:
        return f"{file.name}: {len(file.read_bytes())} {unit}"

    @app.task(queue="bad", retry=RetryPolicy(max_attempts=1))
    def fail() -> None:
        raise ValueError("<never>")

    app.topic("user.signup", dict)

    @app.subscribe("user.*", "mail")
    def mail(event: dict[str, Any]) -> None: ...

    return app


@pytest.fixture
def served(url: str, tmp_path: Path) -> App:
    return make_app(url, tmp_path)


def talk(app: App, conversation: Callable[[httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
    """Hold a conversation with the gateway of the app, in this process."""

    async def main() -> None:
        client = options.pop("client", ("127.0.0.1", 5))
        transport = httpx.ASGITransport(app=Gateway(app, **options), client=client, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            await conversation(http)

    asyncio.run(main())


def test_a_job_from_202_to_its_result(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        accepted = await http.post("/v1/tasks/add", json={"a": 2})
        assert accepted.status_code == 202
        assert accepted.headers["location"] == accepted.json()["status_url"] == f"/v1/jobs/{accepted.json()['id']}"
        assert accepted.headers["retry-after"] == "1"
        status = await http.get(accepted.headers["location"], headers={"Prefer": "wait=10"})
        while status.json()["state"] != "succeeded":
            status = await http.get(
                accepted.headers["location"], headers={"Prefer": "wait=10", "If-None-Match": status.headers["etag"]}
            )
        assert status.json()["result"] == 3
        same = await http.get(accepted.headers["location"], headers={"If-None-Match": status.headers["etag"]})
        assert same.status_code == 304
        at_once = await http.post("/v1/tasks/add", json={"a": 2, "b": 5}, headers={"Prefer": "wait=10"})
        assert (at_once.status_code, at_once.json()["result"]) == (200, 7)
        events = await http.get(f"{accepted.headers['location']}/events")
        identity, kind, data, *_ = events.text.splitlines()
        assert (kind, data[:7]) == ("event: succeeded", "data: {")
        seen = {"Last-Event-ID": identity.removeprefix("id: ")}
        assert (await http.get(f"{accepted.headers['location']}/events", headers=seen)).status_code == 204

    with working(served):
        talk(served, conversation)


def test_options_and_cancelling(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        accepted = await http.post("/v1/tasks/add?delay=60&priority=5&key=k", json={"a": 2})
        location = accepted.headers["location"]
        assert (await http.get(location)).json()["state"] == "scheduled"
        assert (await http.delete(location)).status_code == 202
        assert (await http.get(location)).json()["state"] == "cancelled"
        assert (await http.delete(location)).status_code == 409

    talk(served, conversation)


@pytest.mark.parametrize(
    ("path", "sent", "status", "text"),
    [
        ("/v1/tasks/ad", {"json": {}}, 404, "did you mean 'add'"),
        ("/v1/tasks/add", {"json": {"a": "x"}}, 422, "$.a"),
        ("/v1/tasks/add", {"json": {"a": 1, "c": 2}}, 422, "c"),
        ("/v1/tasks/add", {"json": [1]}, 422, "object"),
        ("/v1/tasks/add", {"content": b"{"}, 400, "JSON"),
        ("/v1/tasks/add", {"content": b"\xff"}, 400, "JSON"),
        ("/v1/tasks/add", {"content": b"a=1", "headers": {"Content-Type": "text/plain"}}, 415, "text/plain"),
        ("/v1/tasks/add?dealy=1", {"json": {"a": 1}}, 400, "dealy"),
        ("/v1/tasks/add?delay=soon", {"json": {"a": 1}}, 400, "delay"),
        ("/v1/tasks/add?delay=-1", {"json": {"a": 1}}, 422, "delay"),
        ("/v1/tasks/add?at=2026-01-01", {"json": {"a": 1}}, 400, "time zone"),
        ("/v1/tasks/add?priority=11", {"json": {"a": 1}}, 422, "priority"),
        ("/v1/tasks/add", {"json": {"a": 1}, "headers": {"Idempotency-Key": "x" * 300}}, 400, "Idempotency-Key"),
        ("/v1/tasks/add", {"json": {"a": 1}, "headers": {"Idempotency-Key": '"'}}, 400, "Idempotency-Key"),
        ("/v1/tasks/add", {"json": {"a": 1}, "headers": {"Prefer": "wait=x"}}, 400, "wait"),
        ("/v1/tasks/add", {"content": b'{"a": 1, "b": %s}' % (b"1" * 300_000)}, 413, "262,144"),
        ("/v1/tasks/size", {"json": {"file": "upload:../secret"}}, 422, "multipart"),
        ("/v1/tasks/size", {"data": {"file": "x"}, "files": {"unit": b"x"}}, 422, "file"),
        ("/v1/topics/user.sign", {"json": {}}, 404, "did you mean"),
        ("/v1/topics/user.signup", {"json": [1]}, 422, "object"),
        ("/v1/dead-letters/nobody/redrive", {"json": {}}, 404, "nobody"),
        ("/v1/dead-letters/bad/redrive", {"json": {"id": 1}}, 422, "id"),
        ("/v1/queues", {"json": {}}, 405, "GET"),
        ("/v1/tasks/add/", {"json": {"a": 1}}, 404, "/openapi.json"),
    ],
)
def test_wrong_requests_are_answered_with_a_problem(
    served: App, path: str, sent: dict[str, Any], status: int, text: str
) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        answer = await http.post(path, **sent)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert text in problem["detail"]
        queues = (await http.get("/v1/queues")).json()["queues"]
        assert sum(queue["ready"] for queue in queues) == 0

    talk(served, conversation)
    assert not list((served.blobs.directory).glob("*/*")), "what is refused leaves no file behind"


def test_an_idempotency_key_makes_one_job(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        headers = {"Idempotency-Key": '"order-42"'}
        answers = await asyncio.gather(
            *(http.post("/v1/tasks/add", json={"a": 2}, headers=headers) for _ in range(100))
        )
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = await http.post("/v1/tasks/add", json={"a": 3}, headers=headers)
        assert other.status_code == 422

    talk(served, conversation)


def test_an_upload_reaches_the_handler_and_is_removed_after_it(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        answer = await http.post(
            "/v1/tasks/size",
            files={"file": ("../../a b.txt", b"x" * 100_000)},
            data={"unit": "B"},
            headers={"Prefer": "wait=10"},
        )
        assert answer.json()["result"] == "a b.txt: 100000 B"
        await asyncio.to_thread(wait_until, lambda: not list(served.blobs.directory.iterdir()), "the file is removed")

    with working(served):
        talk(served, conversation)


def test_dead_letters_over_http(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/tasks/fail", json={}, headers={"Prefer": "wait=10"})
        job = answer.json()
        assert (answer.status_code, job["state"], job["error"]["title"]) == (200, "dead", "ValueError")
        (letter,) = (await http.get("/v1/dead-letters/bad")).json()["dead_letters"]
        assert letter["id"] == job["id"]
        assert "raise ValueError" in letter["failures"][0]["traceback"]
        one = f"/v1/dead-letters/bad/{job['id']}"
        assert (await http.get(one)).json() == letter
        assert (await http.post(f"{one}/redrive")).json() == {"redriven": 1}
        await asyncio.to_thread(
            wait_until, lambda: served.job(job["id"]).status().state is JobState.DEAD, "it is dead again"
        )
        assert (await http.delete(one)).status_code == 204
        assert (await http.get(one)).status_code == 404
        assert (await http.post(f"{one}/redrive")).status_code == 404

    with working(served):
        talk(served, conversation)


def test_the_token_guards_everything_but_health(served: App) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = await http.post("/v1/tasks/add", json={"a": 1}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "secret" not in answer.text
        answer = await http.post("/v1/tasks/add", json={"a": 1}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 202

    talk(served, conversation, token="secret", client=("203.0.113.5", 5))


def test_without_a_token_only_this_machine_is_served(served: App) -> None:
    async def stranger(http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/queues")).status_code == 403

    async def browser(http: httpx.AsyncClient) -> None:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
            assert (await http.get("/v1/queues", headers=headers)).status_code == 403
        assert (await http.get("/v1/queues", headers={"Origin": "http://localhost"})).status_code == 200

    async def others(http: httpx.AsyncClient) -> None:
        for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"}, {"Host": "[::1"}):
            answer = await http.get("/v1/queues", headers=headers)
            assert (answer.status_code, "POSTROOM_TOKEN" in answer.json()["detail"]) == (403, True)

    async def mapped(http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/queues")).status_code == 200

    talk(served, stranger, client=("203.0.113.5", 5))
    talk(served, browser)
    talk(served, others)
    talk(served, mapped, client=("::ffff:127.0.0.1", 5))
    with pytest.raises(ConfigurationError, match="token"):
        serve(served, host="0.0.0.0")


@pytest.mark.parametrize(
    "options", [{"token": ""}, {"token": " a"}, {"token": "ü"}, {"token": "t", "public": True}, {"max_batch": 0}]
)
def test_options_that_would_not_do_what_they_say(served: App, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Gateway(served, **options)


def test_forms_say_what_they_mean(served: App) -> None:
    """A form knows only text; the parameters' types say what is meant, and nothing in it is left out."""

    @served.task(queue="forms")
    def fill(file: Upload | None = None, name: str | None = None, count: int = 0, day: date | None = None) -> Any:
        return [file and file.name, name, count, day and day.year]

    async def conversation(http: httpx.AsyncClient) -> None:
        async def send(*parts: tuple[str, str], **more: Any) -> httpx.Response:
            form = [(name, (None, value)) for name, value in parts]
            files = [("file", file) for file in more.get("files", [])]
            return await http.post("/v1/tasks/fill", files=form + files, headers={"Prefer": "wait=10"})

        filled = await send(("name", "123"), ("count", "7"), ("day", "2026-11-24"), files=[("a.txt", b"x")])
        assert filled.json()["result"] == ["a.txt", "123", 7, 2026]
        assert (await send(("arguments", '{"name": "x"}'))).json()["result"] == [None, "x", 0, None]
        for parts in (
            [("count", "1"), ("count", "2")],
            [("name", "x"), ("arguments", '{"name": "y"}')],
            [("arguments", '{"file": "upload:f/x"}')],
            [("arguments", "[]")],
            [("no", "1")],
        ):
            assert (await send(*parts)).status_code == 422, parts
        assert (await send(files=[("a", b"x"), ("b", b"y")])).status_code == 422
        assert (await send(("arguments", "{"))).status_code == 400
        # What a browser sends for a file field that was left empty.
        empty = b'--b\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n\r\n--b--\r\n'
        headers = {"Prefer": "wait=10", "Content-Type": "multipart/form-data; boundary=b"}
        left_empty = await http.post("/v1/tasks/fill", content=empty, headers=headers)
        assert left_empty.json()["result"] == [None, None, 0, None]

    with working(served):
        talk(served, conversation)


def test_a_full_queue_is_429(url: str, tmp_path: Path) -> None:
    async def conversation(http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/tasks/add", json={"a": 1})).status_code == 202
        answer = await http.post("/v1/tasks/add", json={"a": 1})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")

    talk(make_app(url, tmp_path, queue_limit=1), conversation)


APP = """
from postroom import App
app = App()
@app.task
def add(a: int) -> int:
    return a + 1
"""


@pytest.mark.slow
def test_every_202_survives_the_gateway(tmp_path: Path) -> None:
    """I35: the gateway is killed again and again while clients post; every id it gave out completes."""
    (tmp_path / "tasks.py").write_text(APP)
    environment = {**os.environ, "POSTROOM_BROKER": f"sqlite:///{tmp_path}/postroom.db"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "postroom", "serve", "tasks:app", "--port", str(port)]
    rng, accepted = random.Random(35), []
    for _ in range(4):
        gateway = subprocess.Popen(command, cwd=tmp_path, env=environment)
        try:
            accepted += asyncio.run(post_until_it_dies(gateway, port, rng.uniform(0.2, 0.8)))
        finally:
            gateway.kill()
            gateway.wait()
    assert len(accepted) > 50
    worker = [sys.executable, "-m", "postroom", "worker", "tasks:app", "--drain"]
    subprocess.run(worker, cwd=tmp_path, env=environment, check=True, capture_output=True)
    with App(environment["POSTROOM_BROKER"]) as app:
        assert {app.job(job_id).status().state for job_id in accepted} == {JobState.SUCCEEDED}


async def post_until_it_dies(gateway: subprocess.Popen[bytes], port: int, seconds: float) -> list[str]:
    accepted: list[str] = []

    async def client(http: httpx.AsyncClient) -> None:
        while True:
            try:
                answer = await http.post("/v1/tasks/add", json={"a": 1})
            except httpx.TransportError:
                return
            assert answer.status_code == 202
            accepted.append(json.loads(answer.text)["id"])

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        deadline = time.monotonic() + 20
        while True:
            try:
                await http.get("/readyz")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        clients = [asyncio.create_task(client(http)) for _ in range(8)]
        await asyncio.sleep(seconds)
        gateway.send_signal(signal.SIGKILL)
        await asyncio.gather(*clients)
    return accepted
