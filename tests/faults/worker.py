"""A bare worker process: ``python -m tests.faults.worker [concurrency]``."""

from __future__ import annotations

import logging
import sys

from tests.faults.app import app

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s")
    app.run_worker(concurrency=int(sys.argv[1]) if len(sys.argv) > 1 else 50)
