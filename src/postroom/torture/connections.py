"""Cuts the TCP connections of this very process, whatever library holds them, as a network failure would."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from urllib.parse import urlsplit

_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306}


def cut(*, spared: str) -> int:
    """Shut down all but those to the server of the URL ``spared``. Returns how many.

    No proxy stands between: clients of a cluster follow the addresses that its servers name, past any proxy.
    """
    count = 0
    keep = _addresses(spared)
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # Closed meanwhile, or connected to nobody.
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.getpeername()[:2] not in keep:
                    found.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count


def _addresses(url: str) -> set[tuple[str, int]]:
    parts = urlsplit(url)
    if not parts.hostname:
        return set()
    port = parts.port or _PORTS[parts.scheme.partition("+")[0]]
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    return {(str(address[0]), int(address[1])) for *_, address in found}
