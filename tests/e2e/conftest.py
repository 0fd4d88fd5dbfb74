"""Databases of users, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.servers import url_of


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("postgresql", tmp_path_factory) as url:
        yield url


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with url_of("mariadb", tmp_path_factory) as url:
        yield url
