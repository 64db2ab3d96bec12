"""Labelled images or sentences → shards for the `classification` objective: ``label`` in a sample's JSON.

Two sentences become one text, with the tokenizer's separator between them, so that attention sees both.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mmd2v.data.labelled_images import LABEL, LabelledImages, open_labelled
from mmd2v.data.packing import PackReport, Sample, encode, write_shards
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError, nearest

SEPARATOR = "[SEP]"
_JPEG_START = b"\xff\xd8"


class Labelled(NamedTuple):
    """What was written."""

    report: PackReport
    classes: list[str]
    """Their places are the labels."""


def pack_images(source: str | Path, out: str | Path, shard_size: int = 1000, classes: Sequence[str] = ()) -> Labelled:
    """Write images, as `open_labelled` reads them, with the name of the class as caption.

    ``classes`` are those of the training set, so that a test set has the same labels; none: those of ``source``. Raises
    UserError for what cannot be read, a class that is not among them, or an ``out`` that exists.
    """
    images = open_labelled(source, "SOURCE")
    names = _classes(images.classes, classes, source)
    report = write_shards(_image_samples(images, names), out, total=len(images), shard_size=shard_size, what="packing")
    return Labelled(report, names)


def pack_sentences(
    source: str | Path,
    out: str | Path,
    text: Sequence[str],
    label: str,
    *,
    separator: str = SEPARATOR,
    quoted: bool = False,
    shard_size: int = 1000,
    classes: Sequence[str] = (),
) -> Labelled:
    """Write the rows of a tab-separated file with a header.

    Args:
        source: the file.
        out: folder to create.
        text: the column of the sentence, or the two of a pair.
        label: the column of the class.
        separator: what stands between two sentences: the tokenizer's own token.
        quoted: whether fields are quoted as in CSV; GLUE's are not.
        shard_size: samples a shard.
        classes: in the order of their labels; none: those of the file, sorted.

    Raises:
        UserError: the file or a column is missing, a row is broken, or ``out`` exists.
    """
    rows = _rows(Path(source), text, label, quoted)
    names = _classes(sorted({row[-1] for row in rows}), classes, source)
    samples = (
        Sample(f"{number:08}", None, {"captions": [f" {separator} ".join(sentences)], LABEL: names.index(name)})
        for number, (*sentences, name) in enumerate(rows)
    )
    unit = "sentences" if len(text) == 1 else "pairs"
    report = write_shards(samples, out, total=len(rows), shard_size=shard_size, what="packing", unit=unit)
    return Labelled(report, names)


def _image_samples(images: LabelledImages, names: Sequence[str]) -> Iterator[Sample]:
    for number, (name, of_class, data) in enumerate(images.images()):
        pixels = data if isinstance(data, torch.Tensor) else decode_image(data, images.where(name))
        jpeg = data if isinstance(data, bytes) and data.startswith(_JPEG_START) else encode(pixels)
        yield Sample(f"{number:08}", jpeg, {"captions": [of_class.replace("_", " ")], LABEL: names.index(of_class)})


def _classes(found: Sequence[str], given: Sequence[str], source: str | Path) -> list[str]:
    for name in found:
        if given and name not in given:
            raise UserError(f"--classes: {source} holds '{name}', expected one of {', '.join(given)}")
    if len(names := list(given or found)) < 2:
        raise UserError(f"{source}: found the class {', '.join(names)} alone, expected at least two")
    return names


def _rows(path: Path, text: Sequence[str], label: str, quoted: bool) -> list[tuple[str, ...]]:
    if len(text) not in (1, 2):
        raise UserError(f"--text: found {len(text)} columns, expected one or two")
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t", quoting=quoting)
            header = next(reader, [])
            places = [
                _column(path, header, name, flag) for flag, name in (*(("--text", n) for n in text), ("--label", label))
            ]
            for number, row in enumerate(reader, 2):
                cells = tuple(row[place].strip() if place < len(row) else "" for place in places)
                if not all(cells):
                    raise UserError(f"{path}: row {number} lacks a sentence or its label")
                rows.append(cells)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as tab-separated text: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no row behind its header")
    return rows


def _column(path: Path, header: Sequence[str], name: str, flag: str) -> int:
    if name not in header:
        raise UserError(
            f"{flag}: {path} has no column '{name}', found {', '.join(header)[:200]}.{nearest(name, header)}"
        )
    return header.index(name)
