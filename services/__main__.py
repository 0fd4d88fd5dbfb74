"""Private servers for development, or a look whether all that tests need can be had."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from services.base import Server, ServiceMissing
from services.catalogue import BY_HAND, NAMES, make_server
from services.postgresql import PgBouncer
from services.sqs import ElasticMQServer, MotoServer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; by default all but {' and '.join(BY_HAND)}"
    )
    parser.add_argument("--check", action="store_true", help="start each once, which installs it, and stop it")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no service {name}; there are {', '.join(NAMES)}")
    names = options.names or [name for name in NAMES if name not in BY_HAND]
    return _check(names) if options.check else _run(names)


def _check(names: list[str]) -> int:
    """0 if each could be started; where this is no CI also if some could not: their tests are skipped."""
    missing = 0
    servers = [make_server(name, _folder(name)) for name in names]
    if "sqs" in names:
        servers += [MotoServer(_folder("moto")), ElasticMQServer(_folder("elasticmq"))]
    if "postgresql" in names:
        servers.append(PgBouncer(_folder("pgbouncer"), server=5432))
    for server in servers:
        begin = time.monotonic()
        try:
            server.start()
            print(f"{type(server).__name__:18} ready in {time.monotonic() - begin:.1f} s", flush=True)
        except ServiceMissing as error:
            print(f"{type(server).__name__:18} MISSING: {error}", flush=True)
            missing += 1
        finally:
            server.stop()
    return 1 if missing and os.environ.get("CI") else 0


def _run(names: list[str]) -> int:
    with ExitStack() as stack:
        for name in names:
            server: Server = make_server(name, _folder(name))
            stack.callback(server.stop)
            try:
                server.start()
            except ServiceMissing as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            print(f"{name:10} {server.url}", flush=True)
        print("Ctrl-C stops them", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping", flush=True)
    return 0


def _folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"postroom-{name}-"))


if __name__ == "__main__":
    sys.exit(main())
