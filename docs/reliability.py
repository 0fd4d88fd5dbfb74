"""Puts every broker to the torture and publishes what came out: ``python docs/reliability.py [NAME …] --seconds 900``.

Servers are private ones of ``services``, killed and started again as the plan wants. Without ``--seconds`` only the
table in docs/reliability.md is written anew, from the results in docs/reliability/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import msgspec

from postroom.torture.measure import Outcome, Times
from postroom.torture.report import page

HERE = Path(__file__).parent
RESULTS = HERE / "reliability"
PAGE = HERE / "reliability.md"
EMBEDDED = "sqlite"
SERVERS = {"postgresql": "postgresql", "redis": "redis", "rabbitmq": "amqp", "kafka": "kafka", "sqs": "sqs"}
"""Names in ``services``, and the schemes of their brokers."""
FORGETFUL = {"sqs"}
"""Emulators that keep everything in memory: a restart of theirs would lose what the real service keeps."""
OPTIONS = {"postgresql": "?migrate=auto"}
"""What the URL of a fresh server needs."""
LOAD = ["--rate", "15", "--every", "5"]
"""What two cores can do for all that takes part, even when others use them: a process that is started again needs some
seconds of them, and what is always starting shows nothing."""
_MARKED = re.compile(r"(<!-- generated: results -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """One row a broker."""
    rows = [
        ["broker", "under fault", "faults", "messages", "violations", "again", "after a kill, s", "after a restart, s"],
        ["---"] * 8,
    ]
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem != EMBEDDED, path.stem)):
        outcome = msgspec.json.decode(path.read_bytes(), type=Outcome)
        rows.append(
            [
                f"[{path.stem}](reliability/{path.stem}.html)",
                f"{outcome.seconds / 60:g} min",
                ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items())),
                f"{outcome.sent:,}",
                f"**{len(outcome.violations)}**",
                f"{outcome.again:,}",
                _told(outcome.redelivery),
                _told(outcome.resumed),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _told(times: Times) -> str:
    return "" if times.p50 is None else f"{times.p50:.1f} / {times.p99:.1f}"


def updated(text: str) -> str:
    """The page with the table as it should be."""
    return _MARKED.sub(lambda match: match[1] + table() + match[2], text)


def run(name: str, seconds: float, seed: int, folder: Path | None) -> bool:
    """Returns whether all promises were kept. ``folder``: keeps the histories and logs, in a new directory there."""
    with _broker(name) as arguments:
        command = [sys.executable, "-m", "postroom", "torture", *arguments, "--seed", str(seed)]
        command += ["--folder", str(folder / name)] if folder is not None else []
        done = subprocess.run(
            [*command, "--seconds", f"{seconds:g}", *LOAD, "--json"],
            stdout=subprocess.PIPE,
            check=False,
            env=_environment(),
        )
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{name}: exit code {done.returncode}")
    outcome = msgspec.structs.replace(
        msgspec.json.decode(done.stdout, type=Outcome),
        broker=name,
        command=f"python docs/reliability.py {name} --seconds {seconds:g} --seed {seed}",
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_bytes(msgspec.json.encode(outcome) + b"\n")
    (RESULTS / f"{name}.html").write_text(page(outcome), encoding="utf-8")
    return not outcome.violations


@contextmanager
def _broker(name: str) -> Iterator[list[str]]:
    """The arguments that name a running broker, and how to restart it."""
    if name == EMBEDDED:
        yield []
        return
    from services.catalogue import make_server
    from services.restarts import Restarter

    with tempfile.TemporaryDirectory(prefix=f"postroom-{name}-") as folder:
        server = make_server(name, Path(folder) / "server")
        try:
            server.start()
            with Restarter(server, Path(folder)) as restarter:
                url = server.url + OPTIONS.get(name, "")
                yield [url] if name in FORGETFUL else [url, "--restart", restarter.command]
        finally:
            server.stop()


def _environment() -> dict[str, str]:
    from services.sqs import CREDENTIALS

    return {**os.environ, **CREDENTIALS}


def main() -> int:
    known = {point.name for point in entry_points(group="postroom.brokers")}
    names = [EMBEDDED, *(name for name, scheme in SERVERS.items() if scheme in known)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; by default all")
    parser.add_argument("--seconds", type=float, help="under fault, each; without it nothing is run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the histories and logs there")
    options = parser.parse_args()
    for name in options.names:
        if name not in names:
            parser.error(f"no broker {name}; there are {', '.join(names)}")
    sound = True
    if options.seconds is not None:
        for name in options.names or names:
            print(f"{name}: {options.seconds:g} s under fault", flush=True)
            sound = run(name, options.seconds, options.seed, options.folder) and sound
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
