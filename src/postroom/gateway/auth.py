"""Who may use the gateway: holders of the token; without one, only this machine."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from postroom.gateway.problems import Problem

OPEN = ("/healthz", "/readyz")
"""Paths that tell nothing but whether the gateway lives."""


class Guard:
    """ASGI middleware in front of everything.

    With a token, every request must bring it. Without one only loopback clients are served, and of their
    browsers only pages of the gateway itself: a page from elsewhere may neither post here (``Origin``) nor
    read by way of a name that resolves to this machine (``Host``).
    """

    def __init__(self, app: ASGIApp, token: str | None, public: bool) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            refusal = self._refusal(request)
            if refusal is not None:
                status, detail = refusal
                headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
                await Problem(status, detail, headers=headers).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if path in OPEN:
            return None
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
                return None
            return 401, "send the header Authorization: Bearer with the gateway's token"
        if self._public:
            return None
        if request.client is None or not is_loopback(request.client.host):
            return 403, "this gateway has no token, so it serves clients on its own machine only"
        if not is_loopback(urlsplit(f"//{request.headers.get('host', 'localhost')}").hostname or ""):
            return 403, "without a token the Host header must name this machine, as localhost"
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return 403, f"a page from {origin} may not use a gateway without a token"
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
