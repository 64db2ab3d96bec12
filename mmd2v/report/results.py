"""Results that `mmd2v eval … --json` wrote, told apart by their keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmd2v.errors import UserError, nearest
from mmd2v.report.published import DIRECTIONS, Published

RECALL_KEYS = tuple(f"{direction}_R@{k}" for direction in DIRECTIONS for k in (1, 5, 10))
PAIR_KEYS = tuple(f"{side}_R@{k}" for side in ("second_to_first", "first_to_second") for k in (1, 5))
_DATA_KEYS = ("data", "shards", "file", "test")
_STANDARD = ("standard", "karpathy")


@dataclass(frozen=True)
class RetrievalResult:
    """Image–text recall of one model on one set."""

    model: str
    set: str
    file: str
    numbers: Mapping[str, float]
    """`RECALL_KEYS` as fractions."""
    images: int | None
    captions: int | None
    protocol: str | None = None
    """Name of a protocol other than the standard one, whose figures do not compare with it."""


@dataclass(frozen=True)
class PairsResult:
    """Text-pair recall of one model on one file."""

    model: str
    pooling: str
    set: str
    file: str
    pairs: int
    numbers: Mapping[str, float]
    """`PAIR_KEYS` and ``mean`` as fractions."""


@dataclass(frozen=True)
class ClassesResult:
    """Accuracy of one model on labelled images or texts."""

    model: str
    task: str
    """10-NN, linear probe, zero-shot …"""
    set: str
    file: str
    top1: float
    top5: float | None
    chance: float | None


Result = RetrievalResult | PairsResult | ClassesResult


def read_results(paths: Sequence[str | Path], known: Published) -> list[Result]:
    """Read result files, and those directly inside folders (``*.json``), in the order given.

    A second result of the same model on the same set gets its file's name beside the model's. Raises UserError for a
    file that is missing, no JSON, or no result of ``mmd2v eval``.
    """
    found: list[Result] = []
    for file in _files(paths):
        found += _results(file, _read(file), known)
    taken: set[tuple[object, ...]] = set()
    named = []
    for result in found:
        if _identity(result) in taken:
            result = replace(result, model=f"{result.model} ({Path(result.file).stem})")
        taken.add(_identity(result))
        named.append(result)
    return named


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise UserError(f"RESULTS: {path} holds no .json file, expected results of `mmd2v eval … --json`")
            yield from inside
        elif path.is_file():
            yield path
        else:
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"RESULTS: {path} not found.{nearest(path.name, siblings)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"RESULTS: {file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"RESULTS: {file} holds a {type(content).__name__}, expected a result of `mmd2v eval … --json`")
    return content


def _results(file: Path, record: dict[str, Any], known: Published) -> list[Result]:
    model = str(record.get("model", file.stem))
    if any(key in record for key in RECALL_KEYS):
        return [_retrieval(file, model, record, known)]
    for key, task in _CLASS_TASKS.items():
        if key in record:
            return [_classes(file, model, key, task, record)]
    if "poolings" in record and isinstance(record["poolings"], dict):
        parts = [{"file": record.get("file"), "pooling": name, **part} for name, part in record["poolings"].items()]
        return [result for part in parts for result in _pairs(file, model, part)]
    if "sets" in record or any(key in record for key in PAIR_KEYS):
        return list(_pairs(file, model, record))
    raise UserError(
        f"RESULTS: {file} has none of the keys of a result ({RECALL_KEYS[0]}, {PAIR_KEYS[0]}, "
        f"{', '.join(_CLASS_TASKS)}); expected a file written by `mmd2v eval … --json`"
    )


_CLASS_TASKS = {
    "knn_top1": "{k}-NN",
    "linear_probe_top1": "linear probe",
    "zero_shot_top1": "zero-shot",
    "accuracy": "fine-tuned",
}


def _retrieval(file: Path, model: str, record: dict[str, Any], known: Published) -> RetrievalResult:
    numbers = {key: _fraction(file, record, key) for key in RECALL_KEYS if key in record}
    images, captions = record.get("images"), record.get("captions")
    protocol = record.get("protocol")
    protocol = None if protocol is None or str(protocol) in _STANDARD else str(protocol)
    return RetrievalResult(
        model, _set_of(file, record, known, protocol), str(file), numbers, images, captions, protocol
    )


def _set_of(file: Path, record: dict[str, Any], known: Published, protocol: str | None) -> str:
    """The published set that was measured; else its own name, which is none of theirs.

    By the keys ``public_set``, which is written once the ids have been looked at, or ``set``, and by the counts: of a
    part recall is higher than of the whole. By a protocol of copies the images are as many as the captions.
    """
    images, captions = record.get("images"), record.get("captions")
    own = record.get("public_set", record.get("set"))
    names = " ".join([file.stem, *(str(record.get(key, "")) for key in _DATA_KEYS)]).lower()
    for name, wanted in known.sets.items():
        sizes = (wanted.images,) if protocol is None else (wanted.images, wanted.captions)
        fits = captions == wanted.captions and images in sizes
        if own is not None:
            if str(own).lower().startswith(name):
                return name if fits else f"{own}, {images} images and {captions} captions of it"
        elif fits and "public_set" not in record and wanted.named in names:
            return name
    return _own_name(file, record) if own is None else str(own)


def _own_name(file: Path, record: dict[str, Any]) -> str:
    for key in _DATA_KEYS:
        value = record.get(key)
        if value:
            names = [str(value)] if isinstance(value, str) else [str(item) for item in value]
            # Without their folders: a table is to be read elsewhere.
            return ", ".join(name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name for name in names)
    return file.stem


def _pairs(file: Path, model: str, record: dict[str, Any]) -> Iterator[PairsResult]:
    sets = record.get("sets")
    parts = sets if isinstance(sets, dict) else {_own_name(file, record): record}
    for name, part in parts.items():
        numbers = {key: _fraction(file, part, key) for key in (*PAIR_KEYS, "mean") if key in part}
        pooling = str(record.get("pooling", ""))
        yield PairsResult(model, pooling, str(name), str(file), int(part.get("pairs", 0)), numbers)


def _classes(file: Path, model: str, key: str, task: str, record: dict[str, Any]) -> ClassesResult:
    top5 = key.replace("top1", "top5")
    return ClassesResult(
        model,
        task.format(k=record.get("k", "k")),
        str(record.get("set") or _own_name(file, record)),
        str(file),
        _fraction(file, record, key),
        _fraction(file, record, top5) if top5 != key and top5 in record else None,
        _fraction(file, record, "chance_top1") if "chance_top1" in record else None,
    )


def _fraction(file: Path, record: Mapping[str, Any], key: str) -> float:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and 0 <= value <= 1):
        raise UserError(f"RESULTS: {file}: {key} is {value!r}, expected a fraction from 0 to 1")
    return float(value)


def _identity(result: Result) -> tuple[object, ...]:
    extra: tuple[object, ...]
    if isinstance(result, RetrievalResult):
        extra = (result.protocol,)
    elif isinstance(result, PairsResult):
        extra = (result.pooling,)
    else:
        extra = (result.task,)
    return (type(result), result.model, result.set, *extra)
