"""Results of runs as a CSV, as Markdown tables with intervals, and with the conditions they were measured under."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from intervals import Estimate, binomial_half_width, mean_interval, paired_difference

import mmd2v
from mmd2v.files import atomic_path
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version

_PACKAGES = ("torch", "deepspeed", "transformers", "timm")
_LABELS = {
    "i2t": "image → text",
    "t2i": "text → image",
    "first_to_second": "sentence 1 → 2",
    "second_to_first": "sentence 2 → 1",
    "knn_top1": "k-NN accuracy",
    "mean": "mean of the four",
}


class RunResult(NamedTuple):
    """What a finished run is judged by; recall in fractions."""

    row: str
    seed: int
    steps: int
    recall: dict[str, float]
    images: int | None
    captions: int | None
    minutes: float
    """Of the training steps alone."""
    student_parameters: int | None
    trainable_parameters: int | None
    """Of the student and of what the objectives bring."""
    queries: int | None = None
    """Of a measurement after training: images or sentence pairs that a number is a share of."""


def recall_keys(results: Sequence[RunResult]) -> list[str]:
    """Return the numbers that some run has, in the order of the first that has them."""
    return list(dict.fromkeys(key for result in results for key in result.recall))


def write_csv(path: Path, results: Sequence[RunResult]) -> None:
    """One row a run, recall in percent."""
    keys = recall_keys(results)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        counts = ["student_parameters", "trainable_parameters"]
        writer.writerow(["row", "seed", "steps", *keys, "train_minutes", *counts])
        for result in results:
            cells = [f"{100 * result.recall[key]:.2f}" if key in result.recall else "" for key in keys]
            numbers = [f"{result.minutes:.2f}", result.student_parameters, result.trainable_parameters]
            writer.writerow([result.row, result.seed, result.steps, *cells, *numbers])


def conditions(command: Sequence[str], settings: dict[str, Any], results: Sequence[RunResult]) -> dict[str, Any]:
    """What a reader must know to trust or repeat the numbers; nothing that names the machine or its folders."""
    return {**surroundings(command), **settings, "results": [result._asdict() for result in results]}


def surroundings(command: Sequence[str]) -> dict[str, Any]:
    """The command, and what it ran on."""
    return {
        "command": " ".join(without_folder(word) for word in command),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "mmd2v": mmd2v.__version__,
            "commit": code_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def summary_table(results: Sequence[RunResult], what: str = "Recall") -> str:
    """Make the table of means of ``what``, with Student's t interval over the seeds where there are several."""
    rows = _by_row(results)
    keys = recall_keys(results)

    def cells(row: str) -> list[str]:
        own = rows[row]
        minutes = f"{mean_interval([result.minutes for result in own]).mean:.1f}"
        millions = [_millions(own[0].student_parameters), _millions(own[0].trainable_parameters)]
        seeds = ", ".join(str(result.seed) for result in own)
        return [seeds, *(_percent(_estimate(own, key)) for key in keys), *millions, minutes]

    header = ["row", "seeds", *map(_label, keys), "student (M)", "trainable (M)", "training (min)"]
    several = any(len(own) > 1 for own in rows.values())
    interval = ", mean ± 95 % interval over the seeds (Student's t)" if several else ""
    note = f"{what} in percent{interval}."
    return f"{note}\n\n{_markdown(header, rows, cells)}"


def difference_table(results: Sequence[RunResult], baseline: str) -> str:
    """Make the table of differences to a row, seed by seed."""
    rows = _by_row(results)
    keys = recall_keys(results)
    base = rows.pop(baseline, [])

    def cells(row: str) -> list[str]:
        found = []
        for key in keys:
            own, of_base = ({r.seed: r.recall[key] for r in one if key in r.recall} for one in (rows[row], base))
            found.append(_percent(paired_difference(own, of_base), sign="+"))
        common = sorted({r.seed for r in rows[row]} & {r.seed for r in base})
        return [", ".join(map(str, common)) or "–", *found]

    table = _markdown(["row", "seeds", *map(_label, keys)], rows, cells)
    return (
        f"Difference to `{baseline}` in points, seed by seed, mean ± 95 % interval (Student's t of the differences; "
        f"none with one seed).\n\n{table}"
    )


def sampling_note(results: Sequence[RunResult]) -> str:
    """Say how far another test set of this size might move a recall."""
    if (queries := results[0].queries) is not None:
        half, share = max((binomial_half_width(n, queries), n) for result in results for n in result.recall.values())
        return (
            f"Another test set of this size might move a number by (95 %, binomial) ± {100 * half:.1f} points at most "
            f"({queries:,} queries, at {100 * share:.1f} %). All rows share one test set: their differences move less."
        )
    parts = []
    for direction, count in (("i2t", results[0].images), ("t2i", results[0].captions)):
        key = f"{direction}_R@1"
        values = [result.recall[key] for result in results if key in result.recall]
        if values and count:
            mean = sum(values) / len(values)
            half = 100 * binomial_half_width(mean, int(count))
            parts.append(f"± {half:.1f} points for {_LABELS[direction]} R@1 ({count:,} queries, at {100 * mean:.1f} %)")
    if not parts:
        return "The size of the test set is not on record."
    return (
        f"Another test set of this size might move a recall by (95 %, binomial) {' and '.join(parts)}; captions of one "
        "image are not independent, so it is more than that. All rows share one test set: their differences move less."
    )


def without_folder(word: str) -> str:
    """Drop the folders of an absolute path, also behind ``=`` or a kind with a colon."""
    for separator in ("", "=", ":"):
        before, found, path = word.rpartition(separator) if separator else ("", "", word)
        if path.startswith("/"):
            return f"{before}{found}{Path(path).name}"
    return word


def _by_row(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    rows: dict[str, list[RunResult]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return rows


def _estimate(results: Sequence[RunResult], key: str) -> Estimate | None:
    values = [result.recall[key] for result in results if key in result.recall]
    return mean_interval(values) if values else None


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "–"
    text = f"{100 * estimate.mean:{sign}.1f}"
    return text if estimate.half_width is None else f"{text} ± {100 * estimate.half_width:.1f}"


def _label(key: str) -> str:
    if key in _LABELS:
        return _LABELS[key]
    direction, _, recall = key.rpartition("_")
    return f"{_LABELS.get(direction, direction)} {recall}"


def _millions(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.2f}"


def _markdown(header: Sequence[str], rows: Sequence[str], cells: Callable[[str], list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join([row, *cells(row)])} |" for row in rows]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
