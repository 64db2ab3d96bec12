"""A picture of retrieval: each row is a query and its nearest images, the right ones outlined.

Sizes are in pixels of the finished picture; it is drawn at ``_SCALE`` times that, so that text and outlines stay sharp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageOps

from mmd2v.data.pillow import upright_rgb
from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, check_output
from mmd2v.report.lettering import font, wrap

if TYPE_CHECKING:
    import torch

_SCALE = 2
_TILE = 132
_GAP = 10
_ROW_GAP = 16
_MARGIN = 24
_TEXT_WIDTH = 250
_TEXT_SIZE = 15
_LINE_HEIGHT = 21
_SCORE_SIZE = 11
_SCORE_HEIGHT = 20
_TITLE_SIZE = 17
_TITLE_HEIGHT = 44
_OUTLINE = 4
_RADIUS = 8
_PAPER, _INK, _QUIET, _RIGHT = "#ffffff", "#1f2328", "#6e7781", "#1a9850"
_RESAMPLE = Image.Resampling.LANCZOS
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


@dataclass(frozen=True)
class Found:
    """One result of a query."""

    image: Image.Image
    score: float
    right: bool | None = None
    """Whether it is an image the query belongs to; None: unknown, so nothing is outlined."""


@dataclass(frozen=True)
class PictureRow:
    """A query, a sentence or an image, and its results, nearest first."""

    query: str | Image.Image
    found: Sequence[Found]


def retrieval_rows(
    texts: Sequence[str],
    text_embeddings_QE: torch.Tensor,
    image_embeddings_ME: torch.Tensor,
    own_image_Q: Sequence[int],
    open_image: Callable[[int], Image.Image],
    k: int = 5,
) -> list[PictureRow]:
    """Return a row for each of Q sentences: its ``k`` nearest of M images, the own one marked right.

    ``open_image`` turns an image's row into its picture; only the images shown are opened.
    """
    from mmd2v_kernels import cosine_topk  # which imports torch: other pictures are drawn without

    scores, index = cosine_topk(text_embeddings_QE, image_embeddings_ME, min(k, len(image_embeddings_ME)))
    return [
        PictureRow(text, [Found(open_image(i), s, i == own) for s, i in zip(row_scores, row, strict=True)])
        for text, row_scores, row, own in zip(texts, scores.tolist(), index.tolist(), own_image_Q, strict=True)
    ]


def draw_retrieval(rows: Sequence[PictureRow], title: str | None = None) -> Image.Image:
    """Draw the rows below an optional title. Raises ValueError without rows."""
    if not rows:
        raise ValueError("a retrieval picture needs at least one row")
    columns = max(len(row.found) for row in rows)
    text_queries = any(isinstance(row.query, str) for row in rows)
    query_width = _TEXT_WIDTH if text_queries else _TILE
    head = _TITLE_HEIGHT if title else 0
    width = 2 * _MARGIN + query_width + _GAP + columns * (_TILE + _GAP)
    height = 2 * _MARGIN + head + len(rows) * (_TILE + _SCORE_HEIGHT + _ROW_GAP) - _ROW_GAP
    page = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((_MARGIN * _SCALE, _MARGIN * _SCALE), title, fill=_INK, font=font(_TITLE_SIZE * _SCALE, bold=True))
    for number, row in enumerate(rows):
        top = _MARGIN + head + number * (_TILE + _SCORE_HEIGHT + _ROW_GAP)
        if isinstance(row.query, str):
            _write_query(pen, row.query, _MARGIN, top, query_width)
        else:
            _paste(page, row.query, _MARGIN + query_width - _TILE, top)
            _write_below(pen, "query", _MARGIN + query_width - _TILE, top + _TILE, _QUIET)
        for place, found in enumerate(row.found):
            left = _MARGIN + query_width + 2 * _GAP + place * (_TILE + _GAP)
            _paste(page, found.image, left, top)
            if found.right:
                _outline(pen, left, top)
            right = bool(found.right)
            _write_below(pen, f"{found.score:.3f}", left, top + _TILE, _RIGHT if right else _QUIET, bold=right)
    return page


def check_picture(flag: str, path: str | Path) -> None:
    """Raise a UserError that starts with ``flag`` if no picture can be written at ``path``; creates nothing."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        valid = ", ".join(PICTURE_SUFFIXES)
        raise UserError(
            f"{flag}: {path} ends in '{suffix}', expected one of {valid}.{nearest(suffix, PICTURE_SUFFIXES)}"
        )
    check_output(flag, path)


def write_retrieval_picture(path: str | Path, rows: Sequence[PictureRow], title: str | None = None) -> None:
    """Draw the rows into an image file (the format follows the name's ending), whole or not at all."""
    page = draw_retrieval(rows, title)
    with atomic_path(path) as temporary:
        page.save(temporary)


def _paste(page: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """Put a centred square of the image, upright by its EXIF orientation, with round corners, at (left, top)."""
    side = _TILE * _SCALE
    # Small images are enlarged without blur, so that their pixels stay honest.
    method = Image.Resampling.NEAREST if min(image.size) * 4 <= side else _RESAMPLE
    tile = ImageOps.fit(upright_rgb(image), (side, side), method)
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), _RADIUS * _SCALE, fill=255)
    page.paste(tile, (left * _SCALE, top * _SCALE), mask)


def _outline(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    grow = _OUTLINE
    box = [(left - grow) * _SCALE, (top - grow) * _SCALE, (left + _TILE + grow) * _SCALE, (top + _TILE + grow) * _SCALE]
    pen.rounded_rectangle(box, (_RADIUS + grow) * _SCALE, outline=_RIGHT, width=_OUTLINE * _SCALE)


def _write_below(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, colour: str, bold: bool = False) -> None:
    """Centre a small line under a tile."""
    place = ((left + _TILE / 2) * _SCALE, (top + _OUTLINE + 4) * _SCALE)
    pen.text(place, text, fill=colour, font=font(_SCORE_SIZE * _SCALE, bold=bold), anchor="ma")


def _write_query(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """Write the sentence in lines of at most ``width``, vertically centred on the row; what does not fit is cut."""
    letters = font(_TEXT_SIZE * _SCALE)
    lines = wrap(text, letters, width * _SCALE)
    most = _TILE // _LINE_HEIGHT
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip(" ,;") + " …"]
    first = top + (_TILE - len(lines) * _LINE_HEIGHT) / 2
    for number, line in enumerate(lines):
        pen.text((left * _SCALE, (first + number * _LINE_HEIGHT) * _SCALE), line, fill=_INK, font=letters)
