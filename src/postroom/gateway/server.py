"""``postroom serve``: the gateway on a port of its own."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from postroom.errors import ConfigurationError
from postroom.gateway.auth import is_loopback

if TYPE_CHECKING:
    from postroom.app import App
    from postroom.gateway import Gateway

logger = logging.getLogger("postroom.gateway")

GRACE = 10
"""Seconds that requests under way have after SIGTERM."""


def serve(app: App, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None) -> None:
    """Serve the gateway until SIGTERM or SIGINT, and close the app.

    ``port``: 0 takes a free one. Requests under way have 10 s after the signal; who waits is answered at once.
    Raises ``ConfigurationError`` if ``host`` is reachable from other machines and there is no token.
    """
    from postroom.gateway import Gateway

    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"listening on {host} lets other machines in: set POSTROOM_TOKEN or --token-file, or listen on 127.0.0.1"
        )
    gateway = Gateway(app, token=token)
    try:
        app.connect()
        # uvicorn makes the socket itself: of one made without IPPROTO_TCP asyncio would leave TCP_NODELAY off, and
        # answers would wait 40 ms for an acknowledgement.
        _Server(gateway, host, port).run()
    finally:
        app.close()


class _Server(uvicorn.Server):
    """Ends quietly: those who wait are answered, and the signal is not raised once more afterwards."""

    def __init__(self, gateway: Gateway, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                host=host,
                port=port,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                # What a proxy says of the client must not turn a stranger into this machine.
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._gateway = gateway

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                address, port = listener.getsockname()[:2]
                logger.info("listening on http://%s:%d", f"[{address}]" if ":" in address else address, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._gateway.stop()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
