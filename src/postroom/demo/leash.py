"""Runs the command line so that it cannot outlive who started it: ``python -m postroom.demo.leash serve …``.

The starter holds the other end of standard input. However it ends, even by ``kill -9``, the pipe breaks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_PATIENCE = 10.0
"""Seconds to stop in good order."""


def _hold() -> None:
    # Unbuffered: a reader of sys.stdin would hold its lock while the interpreter shuts down.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_hold, daemon=True).start()
    from postroom.cli.main import main

    sys.argv[0] = "postroom"
    main()
