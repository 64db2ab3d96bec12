"""Documents → passages of a bounded number of words, holding little more of a document than is handed over at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_END = re.compile(r"""[.!?…。！？][.!?…"'”’»)\]}]*$""")
# fmt: off
_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "etc", "vol", "pp", "fig", "al", "gen", "col", "lt",
    "capt", "rev", "hon", "messrs", "e.g", "i.e", "cf",
))
# fmt: on


def ends_sentence(word: str) -> bool:
    """Whether a sentence may end with this word: not with a title, an initial or another abbreviation."""
    if not _END.search(word):
        return False
    bare = word.lstrip("\"'“‘«([{").rstrip(".").lower()
    return not (word.endswith(".") and (bare in _ABBREVIATIONS or (len(bare) == 1 and bare.isalpha() and bare != "i")))


def passages(parts: Iterable[list[str] | None], most: int) -> Iterator[str]:
    """Cut a document.

    Whole paragraphs are put together while they fit. A paragraph of more than ``most`` words is cut behind sentences,
    a sentence of more than ``most`` behind words; no word is ever cut.

    Args:
        parts: the words of the document in order, some at a time; None ends a paragraph. Where they are parted does
            not matter.
        most: words of a passage at most.

    Yields:
        Passages, none empty, their words separated by single spaces: together exactly the words of the document.
    """
    passage: list[str] = []
    pending: list[str] = []  # words of the paragraph, or of its sentence, that have no place yet
    long = False  # whether the paragraph is known to fit into no passage

    def place(unit: list[str]) -> Iterator[str]:
        """Add words that belong together to this passage, or to the next if they do not fit."""
        nonlocal passage
        if passage and len(unit) <= most < len(passage) + len(unit):
            yield " ".join(passage)
            passage = []
        passage = passage + unit
        while len(passage) > most:  # what fits into no passage fills this one, and goes on in the next
            yield " ".join(passage[:most])
            passage = passage[most:]

    for part in parts:
        if part is None:
            yield from place(pending)
            pending, long = [], False
            continue
        seen = len(pending) if long else 0
        pending = pending + part
        long = long or len(pending) > most
        if not long:
            continue
        start = 0
        for number, word in enumerate(pending[seen:], seen + 1):
            if not word[-1].isalnum() and ends_sentence(word):  # the first alone is ten times as fast
                yield from place(pending[start:number])
                start = number
        pending = pending[start:]
        if len(pending) > most:
            whole = len(pending) - (len(passage) + len(pending)) % most
            yield from place(pending[:whole])
            pending = pending[whole:]
    yield from place(pending)
    if passage:
        yield " ".join(passage)
