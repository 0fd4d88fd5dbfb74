"""Real servers for tests: private ones, one a session, or those that environment variables name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from services.base import Server, ServiceMissing
from services.catalogue import make_server


def named(name: str) -> str | None:
    """The URL of a server that is to be used instead of a private one: ``POSTROOM_TEST_<NAME>_URL``."""
    return os.environ.get(f"POSTROOM_TEST_{name.upper()}_URL")


@contextmanager
def private(name: str, folder: Path) -> Iterator[Server]:
    """A server of one's own, to be killed and frozen. Where it cannot be had the test is skipped; in CI it fails.

    ``POSTROOM_TEST_<NAME>`` names another of the catalogue to be used instead: ``POSTROOM_TEST_REDIS=valkey``.
    """
    chosen = os.environ.get(f"POSTROOM_TEST_{name.upper()}", name)
    with started(make_server(chosen, folder)) as server:
        yield server


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """The same, of one that was made already."""
    try:
        try:
            server.start()
        except ServiceMissing as error:
            if os.environ.get("CI"):
                pytest.fail(f"{server.name}: {error}")
            pytest.skip(f"{server.name}: {error}")
        yield server
    finally:
        server.stop()


@contextmanager
def url_of(name: str, factory: pytest.TempPathFactory) -> Iterator[str]:
    """For a session fixture: the URL of a server that tests may share."""
    url = named(name)
    if url is not None:
        yield url
        return
    with private(name, factory.mktemp(name)) as server:
        yield server.url
