"""A relay that lives in a worker process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 5.0
"""Seconds for what it is sending when the worker stops; what it could not remove is sent again, under the same ids."""


@contextmanager
def relaying(url: str, publish: Callable[..., Any], failed: Callable[[BaseException], None]) -> Iterator[None]:
    """Relay the outbox of the database at ``url`` in a thread. ``failed(error)``: it cannot go on.

    Raises ``ConfigurationError``.
    """
    # Only here: it needs SQLAlchemy, which workers without an outbox may not have.
    from postroom.store.outbox.relay import Relay

    relay = Relay(url, publish)
    stop = threading.Event()

    def run() -> None:
        try:
            relay.run(stop)
        except BaseException as error:
            failed(error)
        finally:
            relay.close()

    thread = threading.Thread(target=run, name="postroom-relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_PATIENCE)
