"""The private servers of tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from services.base import free_port


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell their range in a file")
def test_no_client_is_given_the_port_of_a_server_that_restarts() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < free_port() < first for _ in range(200))
