"""The photo demo on each server: the same app, the same promises, another URL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from services.sqs import CREDENTIALS
from tests.servers import private

ROOT = Path(__file__).parents[2]


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["kafka", "postgresql", "rabbitmq", "redis", "sqs"])
def test_the_demo(name: str, tmp_path: Path) -> None:
    with private(name, tmp_path / "server") as server:
        url = f"{server.url}?migrate=auto" if name == "postgresql" else server.url
        command = [sys.executable, "-m", "postroom", "demo", "--broker", url, "--no-color"]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "sheet.jpg")],
            cwd=ROOT,
            env=os.environ | CREDENTIALS,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing waits, nothing is lost" in done.stdout
    assert (tmp_path / "sheet.jpg").stat().st_size > 10_000
