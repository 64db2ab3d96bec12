"""SLURM's compressed lists of hosts, ``gpu[001-004,7],login``, and of counts, ``4(x2),3``."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def hosts(text: str) -> Iterator[str]:
    """Yield the hosts of ``a[001-004,7],b`` in order; lazily, so that the first of a long range costs nothing.

    Raises ValueError for what is no such list.
    """
    for entry in _entries(text):
        pieces = list(_PIECE.finditer(entry))
        if not pieces or "".join(piece[0] for piece in pieces) != entry:
            raise ValueError(f"'{text}' is no list of hosts")
        yield from _names([(piece[1], piece[2]) for piece in pieces], text)


def counts(text: str) -> list[int]:
    """Return the numbers of ``4(x2),3``, here ``[4, 4, 3]``: tasks of each node. Raises ValueError."""
    numbers: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise ValueError(f"'{text}' is no list of counts")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def _entries(text: str) -> Iterator[str]:
    """Split at the commas that are in no bracket."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _names(pieces: list[tuple[str | None, str | None]], text: str) -> Iterator[str]:
    """Yield every name of an entry, given as (inside of brackets, None) and (None, plain text)."""
    if not pieces:
        yield ""
        return
    (inside, plain), *rest = pieces
    for start in [plain or ""] if inside is None else _ranges(inside, text):
        for end in _names(rest, text):
            yield start + end


def _ranges(inside: str, text: str) -> Iterator[str]:
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"'{text}' is no list of hosts: found '{part}' in brackets")
        first, last = match[1], match[2] or match[1]
        width = len(first)  # the zeros in front belong to the names
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{width}d}"
