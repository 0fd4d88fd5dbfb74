"""Requests per second of the gateway, beside a bare Starlette route that commits one row."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.child import Child, run, say
from benchmarks.scale import Scale
from benchmarks.table import Result, Target, median

TARGET = Target(">=", 0.5)
CONNECTIONS = 32

_BODY = b'{"number":1,"text":"some text"}'


def serve_bare(path: str) -> None:
    """In a child: the bare route, until killed."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    connection = floor.connect(path)

    async def accept(request: Request) -> JSONResponse:
        return JSONResponse({"id": floor.insert_one(connection, await request.body())}, status_code=202)

    _serve(Starlette(routes=[Route("/v1/tasks/noop", accept, methods=["POST"])]))


def serve_postroom() -> None:
    """In a child: the gateway of the measured app, until killed."""
    from benchmarks.tasks import app

    app.connect()
    _serve(app.asgi(public=True))


def _serve(application: Any) -> None:
    import uvicorn

    # With the protocol named: without it asyncio leaves TCP_NODELAY off, and each answer waits 40 ms for an ACK.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(CONNECTIONS)
    say(listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False)).run([listener])


def load(port: int, requests: int) -> float:
    """In a child: so many requests over kept-alive connections. Returns requests per second."""
    return asyncio.run(_load(port, requests))


async def _load(port: int, requests: int) -> float:
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    each = max(1, requests // CONNECTIONS)
    begin = time.monotonic()
    await asyncio.gather(*(_send(reader, writer, port, each) for reader, writer in connections))
    took = time.monotonic() - begin
    for _, writer in connections:
        writer.close()
    return each * CONNECTIONS / took


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, count: int) -> None:
    head = f"POST /v1/tasks/noop HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY
    for _ in range(count):
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if not answer.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(f"the server answered {answer!r} {body!r}")


def measure(scale: Scale, folder: Path) -> list[Result]:
    bare, ours = [], []
    for number in range(scale.runs):
        bare.append(_measured(Child(serve_bare, path=f"{folder}/bare-{number}.db"), scale.requests))
        ours.append(_measured(Child(serve_postroom, broker=f"sqlite:///{folder}/gateway-{number}.db"), scale.requests))
    return [
        Result(
            name=f"POST a job, {CONNECTIONS} connections",
            unit="requests/s",
            postroom=median(ours),
            floor=median(bare),
            runs=tuple(mine / least for mine, least in zip(ours, bare, strict=True)),
            target=TARGET,
        )
    ]


def _measured(server: Child, requests: int) -> float:
    try:
        return float(run(load, port=server.read(), requests=requests))
    finally:
        server.kill()
