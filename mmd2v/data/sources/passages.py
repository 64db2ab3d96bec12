"""Documents → passages of a bounded number of words, in the memory of two passages."""

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


def passages(words: Iterable[str | None], most: int) -> Iterator[str]:
    """Cut a document.

    Whole paragraphs are put together while they fit. A paragraph of more than ``most`` words is cut behind sentences,
    a sentence of more than ``most`` behind words; no word is ever cut.

    Args:
        words: of the document in order; None ends a paragraph.
        most: words of a passage at most.

    Yields:
        Passages, none empty, their words separated by single spaces: together exactly the words of the document.
    """
    passage: list[str] = []
    pending: list[str] = []  # words of the paragraph, or of its sentence, that have no place yet
    ends: list[int] = []  # of the sentences in pending
    long = False  # whether the paragraph is known to fit into no passage

    def place(unit: list[str]) -> Iterator[str]:
        """Add words that belong together to this passage, or to the next if they do not fit."""
        nonlocal passage
        if passage and len(passage) + len(unit) > most:
            yield " ".join(passage)
            passage = []
        passage += unit
        while len(passage) > most:
            yield " ".join(passage[:most])
            passage = passage[most:]

    for word in words:
        if word is None:
            yield from place(pending)
            pending, ends, long = [], [], False
            continue
        pending.append(word)
        if ends_sentence(word):
            ends.append(len(pending))
        long = long or len(pending) > most
        if not long:
            continue
        start = 0
        for end in ends:
            yield from place(pending[start:end])
            start = end
        pending, ends = pending[start:], []
        if len(pending) > most:
            # A sentence that fits into no passage: fill this one, and go on with the rest.
            room = most - len(passage)
            yield " ".join(passage + pending[:room])
            passage, pending = [], pending[room:]
    yield from place(pending)
    if passage:
        yield " ".join(passage)
