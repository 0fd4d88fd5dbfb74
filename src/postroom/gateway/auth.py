"""Who may use the gateway: holders of the token; without one, only this machine."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from postroom.errors import ConfigurationError
from postroom.gateway.problems import Problem

OPEN = ("/healthz", "/readyz")
"""Paths that tell nothing but whether the gateway lives."""
_PROXIED = ("forwarded", "x-forwarded-for")


class Guard:
    """ASGI middleware in front of everything.

    With a token, every request must bring it. Without one only loopback clients are served, and of their
    browsers only pages of the gateway itself: a page from elsewhere may neither post here (``Origin``) nor
    read by way of a name that resolves to this machine (``Host``). What a proxy on this machine passes on comes
    from anywhere, so it is refused too. Raises ``ConfigurationError``.
    """

    def __init__(self, app: ASGIApp, token: str | None, public: bool) -> None:
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
            raise ConfigurationError("the gateway's token must be printable ASCII, not empty, without spaces around it")
        if token is not None and public:
            raise ConfigurationError("Gateway(token=…, public=True): with a token it is not public; give one of them")
        self._app = app
        self._token = None if token is None else token.encode()
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
        detail = _not_local(request)
        return (
            None if detail is None else (403, f"{detail}; start the gateway with a token (POSTROOM_TOKEN) and send it")
        )


def _not_local(request: Request) -> str | None:
    """Why a request may come from elsewhere than a program, or a page of the gateway's, on this machine."""
    if request.client is None or not is_loopback(request.client.host):
        return "without a token only clients on the gateway's own machine are served"
    if any(name in request.headers for name in _PROXIED):
        return "the request came through a proxy, so who sent it is not known"
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if host is not None and not is_loopback(_host_name(f"//{host}")):
        return "without a token the Host header must name this machine, as localhost"
    if origin is not None and origin.partition("://")[2] != host:
        return "a page from elsewhere may not use a gateway without a token"
    return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # How a socket for both families names an IPv4 client.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
