"""What is done to pictures; nothing in here knows of Postroom."""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image, ImageOps

COLOURS = {
    "black": (20, 20, 20), "white": (240, 240, 240), "grey": (128, 128, 128), "brown": (120, 80, 50),
    "red": (190, 45, 40), "orange": (225, 135, 45), "yellow": (230, 210, 80), "green": (80, 130, 60),
    "teal": (60, 140, 140), "blue": (60, 105, 180), "purple": (120, 70, 140), "pink": (225, 150, 170),
}  # fmt: skip


def shrink(photo: Path, width: int) -> Image.Image:
    """The picture, upright, at most ``width`` wide and high. Raises ``OSError`` if the file is damaged."""
    with Image.open(photo) as image:
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((width, width))
    return small


def save(image: Image.Image, target: Path) -> None:
    """Whoever looks, or dies half-way, finds a whole picture or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(f".{os.getpid()}")
    image.save(draft, "JPEG", quality=85)
    draft.replace(target)


def colours(path: Path) -> set[str]:
    """The names of the three colours that cover most of a picture."""
    with Image.open(path) as image:
        few = image.resize((64, 64)).quantize(3)
    palette = few.getpalette() or []
    found = [palette[at : at + 3] for at in range(0, len(palette), 3)]
    return {min(COLOURS, key=lambda name: math.dist(COLOURS[name], rgb)) for rgb in found}
