"""``python -m services [NAME …]``: private servers for development, until Ctrl-C; all of them, if none is named."""

from __future__ import annotations

import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from services.base import ServiceMissing
from services.catalogue import NAMES, make_server


def main(names: list[str]) -> int:
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"no service {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        for name in names or NAMES:
            server = make_server(name, Path(tempfile.mkdtemp(prefix=f"postroom-{name}-")))
            stack.callback(server.stop)
            try:
                server.start()
            except ServiceMissing as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            print(f"{name:10} export POSTROOM_BROKER='{server.url}'", flush=True)
        print("Ctrl-C stops them", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
