"""A contact sheet: images of a data set with their first captions, to see at a glance what training will see.

Sizes are in pixels of the finished picture; it is drawn at ``_SCALE`` times that, so that letters stay sharp.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mmd2v.data.damage import Damage
from mmd2v.data.image_header import MAX_PIXELS, check_pixels
from mmd2v.data.pillow import upright_rgb
from mmd2v.data.shards import ShardSet
from mmd2v.files import atomic_path
from mmd2v.report.lettering import cut, font, wrap

_SCALE = 2
_TILE = 200
_TILE_HEIGHT = 150
_GAP = 18
_MARGIN = 24
_COLUMNS = 6
_HEAD = 40
_LINES = 3  # of a caption
_LINE_HEIGHT = 16
_TEXT_SIZE, _ID_SIZE, _TITLE_SIZE = 12, 9, 15
_ID_HEIGHT = 15
_PASSAGE_LINES = 12  # of a text without image: what fills the place of an image and its caption
_PAPER, _INK, _QUIET, _BED, _BAD = "#ffffff", "#1f2328", "#8b949e", "#f3f4f6", "#c0392b"


@dataclass(frozen=True)
class Cell:
    """One sample on the sheet."""

    id: str
    image: Image.Image | None
    text: str
    """Its first caption, or what is wrong with it."""
    more: int = 0
    """Further captions."""
    bad: bool = False


def draw_samples(shards: ShardSet, count: int, seed: int) -> list[Cell]:
    """Choose samples at random, the same ones for the same data and seed, in file order."""
    chosen = sorted(random.Random(seed).sample(range(len(shards)), min(count, len(shards))))
    return [_cell(shards, *shards.locate(position)) for position in chosen]


def _cell(shards: ShardSet, shard: int, row: int) -> Cell:
    """Read a sample; one that is damaged says so on the sheet."""
    name = f"shard {shard}, sample {row}"
    try:
        index = shards.index(shard)
        name = index.keys[row]
        sample = shards.read(shard, row, images=bool(index.spans[row, 0, 0] >= 0))
        image = None
        if sample.image is not None:
            check_pixels(sample.image, MAX_PIXELS, sample.where)
            image = _shrunk(upright_rgb(Image.open(io.BytesIO(sample.image))))
    except Damage as damage:
        return Cell(name, None, f"{damage.kind}: {damage}", bad=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of a bad image
        return Cell(name, None, f"the image does not decode: {error}", bad=True)
    return Cell(sample.id, image, sample.captions[0], len(sample.captions) - 1)


def _shrunk(image: Image.Image) -> Image.Image:
    """An image no larger than its place on the sheet: a sheet may have thousands."""
    scale = _scale(image)
    return image if scale >= 1 else image.resize(_size(image, scale), Image.Resampling.LANCZOS)


def _scale(image: Image.Image) -> float:
    return min(_TILE * _SCALE / image.width, _TILE_HEIGHT * _SCALE / image.height)


def _size(image: Image.Image, scale: float) -> tuple[int, int]:
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def draw_sheet(cells: Sequence[Cell], title: str) -> Image.Image:
    """Draw cells row by row below a title. Raises ValueError without cells."""
    if not cells:
        raise ValueError("a contact sheet needs at least one sample")
    columns = min(_COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    cell_height = _TILE_HEIGHT + 6 + _LINES * _LINE_HEIGHT + _ID_HEIGHT
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    height = 2 * _MARGIN + _HEAD + rows * (cell_height + _GAP) - _GAP
    page = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    pen = ImageDraw.Draw(page)
    bold = font(_TITLE_SIZE * _SCALE, bold=True)
    heading = cut(title, bold, (width - 2 * _MARGIN) * _SCALE)
    pen.text((_MARGIN * _SCALE, _MARGIN * _SCALE), heading, fill=_INK, font=bold)
    for place, cell in enumerate(cells):
        left = _MARGIN + place % columns * (_TILE + _GAP)
        top = _MARGIN + _HEAD + place // columns * (cell_height + _GAP)
        _draw_cell(page, pen, cell, left, top)
    return page


def write_sheet(path: str | Path, cells: Sequence[Cell], title: str) -> None:
    """Draw the sheet into an image file (the format follows the name's ending), whole or not at all."""
    page = draw_sheet(cells, title)
    with atomic_path(path) as temporary:
        page.save(temporary)


def _draw_cell(page: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    letters, small = font(_TEXT_SIZE * _SCALE), font(_ID_SIZE * _SCALE)
    box = (left * _SCALE, top * _SCALE, (left + _TILE) * _SCALE - 1, (top + _TILE_HEIGHT) * _SCALE - 1)
    width = _TILE * _SCALE
    if cell.image is not None:
        pen.rectangle(box, fill=_BED)
        _paste(page, cell.image, left, top)
        below, most, indent = top + _TILE_HEIGHT + 6, _LINES, 0
    else:
        below, most, indent = top + 8, _PASSAGE_LINES, 8
        tall = (left * _SCALE, top * _SCALE, box[2], (top + _TILE_HEIGHT + 6 + _LINES * _LINE_HEIGHT - 2) * _SCALE)
        pen.rectangle(tall, fill=_BED)
    lines = wrap(cell.text, letters, width - 2 * indent * _SCALE, most)
    for number, line in enumerate(lines):
        at = ((left + indent) * _SCALE, (below + number * _LINE_HEIGHT) * _SCALE)
        pen.text(at, line, fill=_BAD if cell.bad else _INK, font=letters)
    more = f"  +{cell.more}" if cell.more else ""
    name = cut(cell.id, small, width - small.getlength(more)) + more
    last = (
        top + _TILE_HEIGHT + 6 + _LINES * _LINE_HEIGHT + 2
        if cell.image is None
        else below + len(lines) * _LINE_HEIGHT + 2
    )
    pen.text((left * _SCALE, last * _SCALE), name, fill=_QUIET, font=small)


def _paste(page: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """Put the whole image, its aspect kept, into the middle of its place."""
    width, height = _TILE * _SCALE, _TILE_HEIGHT * _SCALE
    scale = _scale(image)
    size = _size(image, scale)
    # Small images are enlarged without blur, so that their pixels stay honest.
    method = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    at = (left * _SCALE + (width - size[0]) // 2, top * _SCALE + (height - size[1]) // 2)
    page.paste(image.resize(size, method), at)
