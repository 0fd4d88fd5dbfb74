"""The HTTP gateway: hand in work, ask for its state, look after what failed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from postroom.errors import ConfigurationError

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise ConfigurationError(f"the gateway needs {error.name}: pip install 'postroom[http]'") from error

from postroom.gateway.auth import Guard
from postroom.gateway.jobs import Jobs
from postroom.gateway.openapi import OpenAPI
from postroom.gateway.operators import Operators
from postroom.gateway.problems import HANDLERS
from postroom.gateway.server import serve
from postroom.gateway.site import Site
from postroom.gateway.tasks import Tasks
from postroom.gateway.topics import Topics

if TYPE_CHECKING:
    from postroom.app import App

__all__ = ["Gateway", "serve"]

MAX_UPLOAD = 100 * 1024 * 1024
MAX_BATCH = 1000


class Gateway:
    """An ASGI app; mount it anywhere.

    ``token``: what clients must send as ``Authorization: Bearer``. ``public``: serve everybody without a token,
    because something in front of it decides. With neither, only clients on the same machine are served.
    ``max_upload``: bytes of a whole form; 100 MiB by default. ``max_batch``: items of a batch; 1000 by default.
    Raises ``ConfigurationError``.
    """

    def __init__(
        self,
        app: App,
        *,
        token: str | None = None,
        public: bool = False,
        max_upload: int = MAX_UPLOAD,
        max_batch: int = MAX_BATCH,
    ) -> None:
        for name, limit in (("max_upload", max_upload), ("max_batch", max_batch)):
            if limit < 1:
                raise ConfigurationError(f"Gateway({name}={limit}): at least 1")
        app.check()
        self._site = Site(app, max_upload, max_batch)
        routes = _routes(self._site, secured=token is not None)
        served = Starlette(routes=routes, exception_handlers=HANDLERS)
        # A redirect would make clients believe that what they posted was taken.
        served.router.redirect_slashes = False
        self._guarded = Guard(served, token, public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    def stop(self) -> None:
        """Answer whoever waits, and end the streams of events, so that the server can stop."""
        self._site.stopping = True


def _routes(site: Site, *, secured: bool) -> list[Route]:
    tasks, topics, jobs, operators = Tasks(site), Topics(site), Jobs(site), Operators(site)
    box = "/v1/dead-letters/{subscription}"
    return [
        _route("/v1/tasks/{task}", POST=tasks.enqueue),
        _route("/v1/tasks/{task}/batch", POST=tasks.enqueue_many),
        _route("/v1/topics/{topic}", POST=topics.publish),
        _route("/v1/events", POST=topics.publish_by_type),
        _route("/v1/jobs/{id}", GET=jobs.show, DELETE=jobs.cancel),
        _route("/v1/jobs/{id}/events", GET=jobs.events),
        _route("/v1/queues", GET=operators.queues),
        _route("/v1/queues/{name}", GET=operators.queue),
        _route("/v1/dead-letters", GET=operators.dead_counts),
        _route(box, GET=operators.dead_letters),
        _route(f"{box}/redrive", POST=operators.redrive),
        _route(f"{box}/{{id}}", GET=operators.dead_letter, DELETE=operators.discard),
        _route(f"{box}/{{id}}/redrive", POST=operators.redrive_one),
        _route("/healthz", GET=operators.healthy),
        _route("/readyz", GET=operators.ready),
        _route("/openapi.json", GET=OpenAPI(site, secured=secured).show),
    ]


def _route(path: str, **methods: Callable[[Request], Awaitable[Response]]) -> Route:
    """One route for all methods of a path, so that a 405 can name them all."""

    async def dispatch(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, dispatch, methods=list(methods))
