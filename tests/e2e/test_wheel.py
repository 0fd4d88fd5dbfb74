"""The wheel, as a new user meets it: installed into an empty environment, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import samples

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(ROOT))
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {part for part in top if not part.endswith(".dist-info")} == {"postroom"}
    for needed in ("py.typed", "cli/main.py", "demo/photos/app.py"):
        assert f"postroom/{needed}" in names
    strays = [
        name for name in names if name.endswith((".db", ".pyc", ".log")) or "/test" in name.replace("/testing", "")
    ]
    assert not strays


def test_a_new_user_gets_the_readme_to_work(wheel: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*install, str(wheel))
    directory = tmp_path / "project"
    directory.mkdir()
    place = _run(python, "-c", "import postroom; print(postroom.__file__)", directory=directory)
    assert Path(place.strip()).is_relative_to(tmp_path / "venv"), "not the installed package"

    (directory / "tasks.py").write_text("from postroom import App\napp = App('memory://')\n")
    refused = subprocess.run(
        [python, "-m", "postroom", "serve", "tasks:app"],
        cwd=directory,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "pip install 'postroom[http]'" in refused.stderr
    assert "Traceback" not in refused.stderr

    _run(*install, f"postroom[http] @ {wheel.as_uri()}")
    _run(python, "-W", "error", samples.__file__, str(ROOT / "README.md"), directory=directory)


def _run(*command: str, directory: Path | None = None) -> str:
    done = subprocess.run(command, cwd=directory, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def _environment() -> dict[str, str]:
    """Without what would let the checkout in."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "POSTROOM"))
    }
