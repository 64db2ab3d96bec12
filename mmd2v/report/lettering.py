"""Letters on pictures: a font that is the same on every machine, and lines of a bounded width."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path

from PIL import ImageFont


@cache
def font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), pixels)


def wrap(text: str, letters: ImageFont.FreeTypeFont, width: float, most: int | None = None) -> list[str]:
    """Break text into lines of at most ``width`` pixels; of more than ``most`` lines the last ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        # A word wider than a line is broken where it must be.
        while len(word) > 1 and letters.getlength(word) > width and (most is None or len(lines) <= most):
            fitting = max(1, _fitting(word, letters, width))
            lines.append(word[:fitting])
            word = word[fitting:]
        if lines and letters.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
        if most is not None and len(lines) > most:
            break
    if most is None or len(lines) <= most:
        return lines
    last = lines[most - 1]
    while " " in last and letters.getlength(f"{last}…") > width:
        last = last.rpartition(" ")[0]
    return [*lines[: most - 1], cut(last, letters, width, always=True)]


def cut(line: str, letters: ImageFont.FreeTypeFont, width: float, *, always: bool = False) -> str:
    """Cut a line to ``width`` pixels with an ellipsis, or put one behind it ``always``."""
    if not always and letters.getlength(line) <= width:
        return line
    return f"{line[: _fitting(line, letters, width - letters.getlength('…'))].rstrip(' ,;')}…"


def _fitting(line: str, letters: ImageFont.FreeTypeFont, width: float) -> int:
    """Characters of the line that fit into ``width``."""
    return bisect_right(range(1, len(line) + 1), width, key=lambda count: letters.getlength(line[:count]))
