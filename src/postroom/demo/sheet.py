"""The contact sheet: all thumbnails on one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = (320, 240)
CAPTION = 34
GAP = 18
_PAPER, _INK, _FAINT = (250, 249, 246), (32, 36, 42), (120, 124, 130)


def size(count: int) -> tuple[int, int]:
    """Pixels of a sheet with so many pictures and its title tile."""
    columns, rows = _grid(count + 1)
    return columns * (TILE[0] + GAP) + GAP, rows * (TILE[1] + CAPTION + GAP) + GAP


def write(target: Path, title: Sequence[str], pictures: Sequence[tuple[str, Path]]) -> None:
    """A title tile, then each picture with its caption. The file appears whole or not at all."""
    sheet = Image.new("RGB", size(len(pictures)), _PAPER)
    _title(sheet, title)
    for number, (caption, path) in enumerate(pictures, start=1):
        _place(sheet, _corner(number, len(pictures) + 1), caption, path)
    draft = target.with_name(f".{target.name}.draft")
    sheet.save(draft, "PNG" if target.suffix.lower() == ".png" else "JPEG", quality=88)
    draft.replace(target)


def _grid(tiles: int) -> tuple[int, int]:
    """The columns and rows that leave the fewest tiles empty, about as wide as a screen."""
    wide = round(math.sqrt(tiles * 1.6))
    columns = min((wide, wide + 1), key=lambda columns: -tiles % columns)
    return columns, -(-tiles // columns)


def _corner(number: int, tiles: int) -> tuple[int, int]:
    row, column = divmod(number, _grid(tiles)[0])
    return GAP + column * (TILE[0] + GAP), GAP + row * (TILE[1] + CAPTION + GAP)


def _title(sheet: Image.Image, lines: Sequence[str]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP + 4, GAP + 24), lines[0], fill=_INK, font=ImageFont.load_default(44))
    for number, line in enumerate(lines[1:]):
        draw.text((GAP + 6, GAP + 92 + 28 * number), line, fill=_FAINT, font=ImageFont.load_default(20))


def _place(sheet: Image.Image, corner: tuple[int, int], caption: str, path: Path) -> None:
    with Image.open(path) as thumbnail:
        thumbnail.thumbnail(TILE)
        left = corner[0] + (TILE[0] - thumbnail.width) // 2
        sheet.paste(thumbnail, (left, corner[1] + TILE[1] - thumbnail.height))
    font = ImageFont.load_default(18)
    draw = ImageDraw.Draw(sheet)
    while draw.textlength(caption, font=font) > TILE[0] and len(caption) > 1:
        caption = caption[:-2].rstrip() + "…"
    draw.text((corner[0] + TILE[0] // 2, corner[1] + TILE[1] + 8), caption, fill=_INK, font=font, anchor="ma")
