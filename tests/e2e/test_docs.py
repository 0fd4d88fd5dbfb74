"""The documentation keeps its word: samples run, links lead somewhere, tables say what the code says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import samples

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = {
    ("README.md", "sets up the checkout and runs the demo or the whole test suite"),
    ("README.md", "needs the package on an index; tests/e2e/test_wheel.py installs the wheel"),
    ("docs/reliability.md", "takes many minutes, and servers"),
    ("docs/simulation.md", "it takes minutes"),
}
"""The only blocks of all pages that are not run, and why."""

_WAIT = "import os; os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)"
"""Waits until what was served has ended, and leaves it to be noticed."""

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_samples_run(page: Path, tmp_path: Path) -> None:
    done = _run(page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_these_are_not_run() -> None:
    left_out = {
        (_name(page), block.action.removeprefix("not run: "))
        for page in PAGES
        for block in samples.read(page)
        if block.action.startswith("not run")
    }
    assert left_out == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{_name(page)} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{_name(page)} links to {link}, which has no such heading"


@pytest.mark.parametrize(
    ("text", "other"), [("a power cut (`fsync`)", "nothing (`none`)"), ("the visibility timeout ends", "at once")]
)
def test_the_tables_of_all_brokers_are_what_they_say(text: str, other: str) -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = (ROOT / "docs" / "semantics.md").read_text()
    assert generate["updated"](page) == page, "run: python docs/generate.py"
    outdated = page.replace(text, other)
    assert outdated != page
    assert generate["updated"](outdated) == page


def test_the_table_of_reliability_is_what_the_runs_said() -> None:
    results = runpy.run_path(str(ROOT / "docs" / "reliability.py"))
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert results["updated"](page) == page, "run: python docs/reliability.py"
    outdated = page.replace("| **0** |", "| **1** |", 1)
    assert outdated != page
    assert results["updated"](outdated) == page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```sh\nls\n```\n", "needs a comment"),
        ("<!-- run -->\n```console\n$ echo one\ntwo\n```\n", "'two'"),
        ("<!-- run -->\n```console\n$ printf 'b\\na\\n'\na\nb\n```\n", "not in this order"),
        ("<!-- run -->\n```console\n$ false\n```\n", "exit code 1"),
        ("<!-- run, exit 1 -->\n```console\n$ true\n```\n", "exit code 0"),
        ("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n", "'2'"),
        ("```python\nassert False, 'seen'\n```\n", "seen"),
        ("<!-- serve -->\n```console\n$ echo hello\ngoodbye\n```\n", "'goodbye'"),
        (f"<!-- serve -->\n```console\n$ echo hello\nhello\n```\n\n```python\n{_WAIT}\n```\n", "ended before"),
        ("  ```python\n  print(1)\n  ```\n", "do not indent"),
    ],
)
def test_a_page_that_lies_is_found_out(text: str, told: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    done = _run(page, tmp_path)
    assert done.returncode != 0
    assert told in done.stderr


def test_what_a_page_shows_may_leave_out_what_varies(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```console\n$ printf 'id 17 ok\\nnoise\\nend\\n'\nid … ok\n…\nend\n```\n")
    done = _run(page, tmp_path)
    assert done.returncode == 0, done.stderr


def _run(page: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", samples.__file__, str(page)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=110)


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
