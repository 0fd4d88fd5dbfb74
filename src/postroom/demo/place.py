"""Where the example lies: in the installed package, or in a checkout of the project."""

from __future__ import annotations

from pathlib import Path

from postroom.errors import ConfigurationError

_HERE = Path(__file__).resolve().parent
_PLACES = (_HERE / "photos", _HERE.parents[2] / "examples" / "photos")
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def example() -> Path:
    """The directory of the photo service. Raises ``ConfigurationError``."""
    for place in _PLACES:
        if (place / "app.py").is_file():
            return place
    raise ConfigurationError(f"the demo's photo service is not in {_PLACES[0]}; install Postroom again")


def photographs(directory: Path) -> list[Path]:
    """The photographs in a directory, by name. Raises ``ConfigurationError`` if there are none."""
    found = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise ConfigurationError(f"no photographs (*.jpg, *.jpeg, *.png) in {directory}; name another with --photos")
    return found
