"""Files of sentence pairs with a label: Quora's question pairs and the MSR paraphrase corpus, positives only.

| format     | columns (tab separated, with a header)                                | quoting |
|------------|-----------------------------------------------------------------------|---------|
| `mrpc`     | Quality, #1 ID, #2 ID, #1 String, #2 String                           | none    |
| `qqp`      | …, question1 or sentence1, question2 or sentence2, is_duplicate       | CSV's   |
| `qqp_glue` | as `qqp`, as GLUE distributes it                                      | none    |
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from mmd2v.errors import UserError, nearest, unknown_name

PairFormat = Literal["auto", "mrpc", "qqp", "qqp_glue"]


class _Layout(NamedTuple):
    """Where a format keeps what: for each the column names it may have."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    label: tuple[str, ...]
    quoting: int


_QQP = (("question1", "sentence1"), ("question2", "sentence2"), ("is_duplicate",))
_LAYOUTS = {
    "mrpc": _Layout(("#1 String",), ("#2 String",), ("Quality",), csv.QUOTE_NONE),
    "qqp": _Layout(*_QQP, csv.QUOTE_MINIMAL),
    "qqp_glue": _Layout(*_QQP, csv.QUOTE_NONE),
}
_POSITIVE, _NEGATIVE = ("1", "1.0"), ("0", "0.0")


@dataclass(frozen=True)
class TextPairs:
    """Positive pairs in the order of the file."""

    first: list[str]
    second: list[str]
    format: str
    broken: int
    """Rows left out up to the last pair taken: without a label, with too few columns, or with an empty sentence."""

    def __len__(self) -> int:
        return len(self.first)


def read_pairs(path: str | Path, format: PairFormat = "auto", limit: int | None = None) -> TextPairs:
    """Return the first ``limit`` positive pairs of a file; white space around a sentence is dropped.

    Raises UserError for a file that is absent, no UTF-8, of another format, or without positive pairs.
    """
    path = Path(path)
    if format != "auto" and format not in _LAYOUTS:
        raise unknown_name("--format", format, ["auto", *_LAYOUTS])
    if limit is not None and limit < 1:
        raise UserError(f"--limit: found {limit}, expected at least 1")
    first: list[str] = []
    second: list[str] = []
    broken = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = [name.strip('"') for name in file.readline().rstrip("\r\n").split("\t")]
            name = _detect(path, header) if format == "auto" else format
            layout = _LAYOUTS[name]
            columns = [_column(path, name, header, names) for names in (layout.first, layout.second, layout.label)]
            for row in _rows(path, csv.reader(file, delimiter="\t", quoting=layout.quoting)):
                one, two, label = (row[i].strip() if i < len(row) else "" for i in columns)
                if label in _NEGATIVE:
                    continue
                if label not in _POSITIVE or not one or not two:
                    broken += 1
                    continue
                first.append(one)
                second.append(two)
                if len(first) == limit:
                    break
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--pairs: {path} not found, expected a file of pairs.{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"--pairs: {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--pairs: {path} is not UTF-8: {error}") from None
    if not first:
        raise UserError(f"--pairs: {path} holds no positive pair ({broken:,} broken rows), expected a label of 1")
    return TextPairs(first, second, name, broken)


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"--pairs: {path} does not parse as tab-separated text: {error}") from None


def _detect(path: Path, header: list[str]) -> str:
    if set(_LAYOUTS["mrpc"].label) <= set(header):
        return "mrpc"
    if {"qid1", "question1"} <= set(header):
        # The two files have one header, and read the wrong way some rows run together or keep stray quotes.
        raise UserError(
            f"--pairs: {path} may be Quora's own file, whose fields are quoted, or GLUE's, whose are not; "
            "say --format qqp or --format qqp_glue"
        )
    if set(chain(*_QQP)) & set(header):
        return "qqp"
    raise UserError(
        f"--pairs: {path} begins with the columns {', '.join(header)[:200]}, expected those of mrpc (Quality, #1 "
        "String, #2 String) or qqp (question1, question2, is_duplicate), separated by tabs"
    )


def _column(path: Path, format: str, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    hint = nearest(names[0], header)
    raise UserError(
        f"--pairs: {path} has no column {' or '.join(names)}, which format {format} needs; found "
        f"{', '.join(header)[:200]}.{hint}"
    )
