"""Runs the samples of a documentation page in the current directory: ``python samples.py PAGE.md``.

Every fenced block does something, or says why it does not. A ``python`` block runs, in the order of the page and in one
namespace. Any other block, and a block that is treated otherwise, has an HTML comment on the line before it:

``<!-- file: tasks.py -->``  it is saved under that name;
``<!-- run -->``             its ``$`` lines are run by the shell; the other lines must be in their output, in order;
``<!-- run, exit 1 -->``     the same, and the last command ends with that exit code;
``<!-- serve -->``           its ``$`` lines are started, their ports and its other lines awaited; stopped at the end;
``<!-- output -->``          it is what the ``python`` block before it printed;
``<!-- not run: why -->``    it is left alone.

In shown output ``…`` stands for any text, and a line of ``…`` for any lines. The port 8000 becomes a free one.
Only the standard library is used, so that it runs with any Python that has Postroom installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!-- (file: \S+|run(?:, exit \d+)?|serve|output|not run: .+) -->$")
_PORT = "8000"
_PATIENCE = 20.0
"""Seconds within which a served program shows that it is ready, or ends once it is told to."""


class SampleError(Exception):
    """A sample does not do what its page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str
    """``page:line`` of its first line of content."""
    line: int
    language: str
    action: str
    """What its comment says; empty for a plain ``python`` block."""
    text: str


def read(page: Path) -> list[Block]:
    """The blocks of a page. Raises ``SampleError`` for one that neither runs nor says why."""
    blocks = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            if "```" in lines[number - 1]:
                raise SampleError(f"{page.name}:{number}: write the fence as ```language, and do not indent it")
            continue
        begin = number
        while lines[number] != "```":
            number += 1
        comment = _COMMENT.match(lines[begin - 2]) if begin >= 2 else None
        place = f"{page.name}:{begin + 1}"
        if comment is None and fence[1] != "python":
            raise SampleError(
                f"{place}: a {fence[1] or 'nameless'} block needs a comment before it that says what it is"
            )
        action = comment[1] if comment else ""
        blocks.append(Block(place, begin, fence[1], action, "\n".join(lines[begin:number]) + "\n"))
        number += 1
    return blocks


class Page:
    """Runs the blocks of one page."""

    def __init__(self) -> None:
        self._module = types.ModuleType("sample")
        # Type hints are looked up in the module of what carries them.
        sys.modules["sample"] = self._module
        self._printed: str | None = None
        self._served: list[tuple[str, subprocess.Popen[bytes]]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])

    def run(self, blocks: list[Block]) -> None:
        """All of them, in order. Raises ``SampleError``, or whatever a sample raises."""
        for block in blocks:
            word, _, rest = block.action.partition(": ")
            text = block.text.replace(_PORT, self._port)
            if word == "file":
                Path(rest).parent.mkdir(parents=True, exist_ok=True)
                Path(rest).write_text(text, encoding="utf-8")
            elif word.startswith("run"):
                self._run(block.place, text, exit_code=int(word.partition("exit ")[2] or 0))
            elif word == "serve":
                self._serve(block.place, text)
            elif word == "output":
                if self._printed is None:
                    raise SampleError(f"{block.place}: no python block before it")
                compare(block.place, text, self._printed)
            elif word != "not run":
                self._execute(block, text)

    def close(self) -> None:
        """Stop what was served. Raises ``SampleError`` if it had ended by itself."""
        ended = [place for place, process in self._served if process.poll() is not None]
        for _, process in self._served:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for _, process in self._served:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if ended:
            raise SampleError(f"{ended[0]}: ended before the page did")

    def _execute(self, block: Block, text: str) -> None:
        # The line numbers of a traceback are those of the page.
        code = compile("\n" * block.line + text, block.place.partition(":")[0], "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self._module.__dict__)
        self._printed = printed.getvalue()

    def _run(self, place: str, text: str, *, exit_code: int) -> None:
        commands, shown = _split(text)
        output = ""
        for number, command in enumerate(commands):
            done = subprocess.run(
                command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_PATIENCE * 3
            )
            output += done.stdout if done.stdout.endswith("\n") else done.stdout + "\n"
            expected = exit_code if number == len(commands) - 1 else 0
            if done.returncode != expected:
                raise SampleError(f"{place}: `{command}` ended with exit code {done.returncode}:\n{output}")
        compare(place, "\n".join(shown), output)

    def _serve(self, place: str, text: str) -> None:
        commands, shown = _split(text)
        for command in commands:
            log = Path(f"served-{len(self._served)}.log")
            with log.open("wb") as file:
                process = subprocess.Popen(
                    shlex.split(command), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            self._served.append((place, process))
            deadline = time.monotonic() + _PATIENCE
            while missing := _missing("\n".join(shown), log.read_text()) or self._closed_port(command):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SampleError(f"{place}: `{command}` did not show {missing!r} but:\n{log.read_text()}")
                time.sleep(0.02)

    def _closed_port(self, command: str) -> str | None:
        """What the command is to listen on and does not yet."""
        if self._port not in command:
            return None
        with socket.socket() as client:
            refused = client.connect_ex(("127.0.0.1", int(self._port)))
        return f"port {self._port}" if refused else None


def compare(place: str, shown: str, output: str) -> None:
    """Raise ``SampleError`` unless the shown lines are in the output, in order."""
    missing = _missing(shown, output)
    if missing is not None:
        raise SampleError(f"{place}: the page shows {missing!r}, which is not there, or not in this order:\n{output}")


def _missing(shown: str, output: str) -> str | None:
    """The first shown line that the output lacks."""
    lines: Iterator[str] = iter([_plain(line) for line in output.splitlines()])
    for line in filter(None, map(_plain, shown.splitlines())):
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("…")))
        if line != "…" and not any(pattern.fullmatch(candidate) for candidate in lines):
            return line
    return None


def _plain(line: str) -> str:
    return " ".join(line.split())


def _split(text: str) -> tuple[list[str], list[str]]:
    """Commands and shown output; a command goes on in the next line after a backslash."""
    commands: list[str] = []
    shown: list[str] = []
    for line in text.splitlines():
        if commands and not shown and commands[-1].endswith("\\"):
            commands[-1] = commands[-1][:-1] + line.strip()
        elif line.startswith("$ "):
            commands.append(line[2:])
        else:
            shown.append(line)
    return commands, shown


def main() -> None:
    page = Page()
    # As a reader would: the commands of this Python first, no colours, a wide terminal, modules from here.
    os.environ.update(
        PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], NO_COLOR="1", COLUMNS="160", TERM="dumb"
    )
    sys.path[0] = os.getcwd()
    try:
        page.run(read(Path(sys.argv[1])))
    finally:
        page.close()


if __name__ == "__main__":
    main()
