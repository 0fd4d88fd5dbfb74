"""The HTTP gateway: hand in work, ask for its state, look after what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postroom.errors import ConfigurationError

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise ConfigurationError(f"the gateway needs {error.name}: pip install 'postroom[http]'") from error

from postroom.errors import PostroomError
from postroom.gateway.auth import Guard, is_loopback
from postroom.gateway.jobs import Jobs
from postroom.gateway.operators import Operators
from postroom.gateway.problems import on_any_error, on_http_error, on_postroom_error
from postroom.gateway.produce import Produce

if TYPE_CHECKING:
    from postroom.app import App

__all__ = ["Gateway", "serve"]

MAX_UPLOAD = 100 * 1024 * 1024


class Gateway:
    """An ASGI app; mount it anywhere.

    ``token``: what clients must send as ``Authorization: Bearer``. ``public``: serve everybody without a token,
    because something in front of it decides. With neither, only clients on the same machine are served.
    ``max_upload``: bytes of a whole form; 100 MiB by default.
    """

    def __init__(
        self, app: App, *, token: str | None = None, public: bool = False, max_upload: int = MAX_UPLOAD
    ) -> None:
        app.check()
        produce, jobs, operators = Produce(app, max_upload), Jobs(app), Operators(app)
        letters = "/v1/dead-letters"
        routes = [
            Route("/v1/tasks/{task}", produce.enqueue, methods=["POST"]),
            Route("/v1/topics/{topic}", produce.publish, methods=["POST"]),
            Route("/v1/jobs/{id}", jobs.show, methods=["GET"]),
            Route("/v1/jobs/{id}", jobs.cancel, methods=["DELETE"]),
            Route("/v1/jobs/{id}/events", jobs.events, methods=["GET"]),
            Route("/v1/queues", operators.queues, methods=["GET"]),
            Route("/v1/queues/{name}", operators.queue, methods=["GET"]),
            Route(letters, operators.dead_counts, methods=["GET"]),
            Route(f"{letters}/{{subscription}}", operators.dead_letters, methods=["GET"]),
            Route(f"{letters}/{{subscription}}/redrive", operators.redrive, methods=["POST"]),
            Route(f"{letters}/{{subscription}}/{{id}}", operators.dead_letter, methods=["GET"]),
            Route(f"{letters}/{{subscription}}/{{id}}", operators.discard, methods=["DELETE"]),
            Route(f"{letters}/{{subscription}}/{{id}}/redrive", operators.redrive_one, methods=["POST"]),
            Route("/healthz", operators.healthy, methods=["GET"]),
            Route("/readyz", operators.ready, methods=["GET"]),
        ]
        handlers = {HTTPException: on_http_error, PostroomError: on_postroom_error, Exception: on_any_error}
        self._guarded = Guard(Starlette(routes=routes, exception_handlers=handlers), token, public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)


def serve(app: App, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None) -> None:
    """Serve the gateway until SIGTERM or SIGINT.

    Raises ``ConfigurationError`` if ``host`` is reachable from other machines and there is no token.
    """
    import uvicorn

    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"listening on {host} lets other machines in: set POSTROOM_TOKEN or --token-file, or listen on 127.0.0.1"
        )
    app.connect()
    uvicorn.run(Gateway(app, token=token), host=host, port=port, log_level="warning", server_header=False)
