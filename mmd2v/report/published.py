"""The published figures of `published.yaml`, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DIRECTIONS = ("i2t", "t2i")
FILE = Path(__file__).with_name("published.yaml")

Recall = Mapping[str, float]
"""``i2t_R@1`` … ``t2i_R@10`` as fractions; what was not published is absent."""


@dataclass(frozen=True)
class PublishedSet:
    """An evaluation set that figures were published of."""

    name: str
    title: str
    images: int
    captions: int
    named: str = ""
    """What the name of its data must hold where nothing but the counts tells a set."""


@dataclass(frozen=True)
class PublishedRow:
    """What was published of one model."""

    model: str
    setting: str
    """zero-shot or fine-tuned"""
    note: str
    tables: tuple[int, ...]
    """Tables of the source that print it; none: published elsewhere."""
    printed: Mapping[str, Recall]
    """Set → as printed"""
    comparable: Mapping[str, Recall]
    """Set → by the standard protocol, as far as it is known: the corrected figures, else the printed ones."""
    corrected: frozenset[str]
    """Sets whose printed figures do not follow the standard protocol."""
    sources: Mapping[str, str]
    """Set → where its printed figures are from"""


@dataclass(frozen=True)
class Published:
    """The whole file."""

    sets: Mapping[str, PublishedSet]
    rows: tuple[PublishedRow, ...]
    correction: str
    """What the corrected figures come from."""
    pair_counts: Mapping[str, int]
    """Positive pairs of ``qqp_train``, ``qqp_dev``, ``mrpc_train``, ``mrpc_test``."""
    pair_source: str


@cache
def published() -> Published:
    """Read the figures; fractions, as our own results hold them."""
    return parse(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def parse(content: Mapping[str, Any]) -> Published:
    """Return the figures of a file's content. Raises KeyError for a source that is not listed."""
    sources, sets = content["sources"], content["sets"]
    rows = []
    for row in content["rows"]:
        of_sets = {name: row[name] for name in sets if name in row}
        printed = {name: _recall(found["printed"]) for name, found in of_sets.items()}
        corrected = {name: _recall(found["corrected"]) for name, found in of_sets.items() if "corrected" in found}
        rows.append(
            PublishedRow(
                row["model"],
                row["setting"],
                row.get("note", ""),
                tuple(row["tables"]),
                printed,
                {**printed, **corrected},
                frozenset(corrected),
                {name: sources[found["source"]] for name, found in of_sets.items()},
            )
        )
    pairs = content["text_pairs"]
    return Published(
        {name: PublishedSet(name, **about) for name, about in sets.items()},
        tuple(rows),
        sources["corrected"],
        pairs["pairs"],
        sources[pairs["source"]],
    )


def _recall(figures: Mapping[str, list[float | None]]) -> Recall:
    return {
        f"{direction}_R@{k}": value / 100
        for direction in DIRECTIONS
        for k, value in zip((1, 5, 10), figures[direction], strict=True)
        if value is not None
    }
