"""Servers that run on Java: their archives from Maven, fetched once."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from services.base import TOOLS, ServiceMissing, require

_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>postroom</groupId><artifactId>services</artifactId><version>1</version>
  <dependencies>{dependencies}</dependencies>
</project>
"""
_DEPENDENCY = """
    <dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>"""


def java(libraries: Path, *options: str, memory: int) -> list[str]:
    """The beginning of a command line, for at most so many MiB of heap. Raises ``ServiceMissing``."""
    program = require("java", "openjdk-17-jre-headless")
    lean = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
    return [program, "-Xms64m", f"-Xmx{memory}m", *lean, *options, "-cp", f"{libraries}/*"]


def fetched(name: str, artifacts: Sequence[str]) -> Path:
    """The folder ``name`` with archives: ``group:artifact:version``, with all they need. Raises ``ServiceMissing``."""
    folder = TOOLS / name
    if folder.exists():
        return folder
    maven = require("mvn", "maven")
    TOOLS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as work:
        dependencies = "".join(_DEPENDENCY.format(*artifact.split(":")) for artifact in artifacts)
        Path(work, "pom.xml").write_text(_POM.format(dependencies=dependencies))
        command = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={work}/lib"]
        done = subprocess.run(
            [maven, "-q", "-B", "-ntp", *command], cwd=work, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServiceMissing(f"cannot fetch {name}: {(done.stdout + done.stderr)[-1000:]}")
        # Two runs may fetch at once: the first to finish wins, whole.
        try:
            Path(work, "lib").rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder
