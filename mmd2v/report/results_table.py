"""Our results beside the published figures: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmd2v.report.published import DIRECTIONS, Published, PublishedSet, Recall
from mmd2v.report.results import PAIR_KEYS, RECALL_KEYS, ClassesResult, PairsResult, Result, RetrievalResult

MEASURED = "measured"
_TITLES = {"i2t": "image → text", "t2i": "text → image"}
_SIDES = {"second_to_first": "2 → 1", "first_to_second": "1 → 2"}
_NOT_PRINTED, _UNKNOWN, _MISSING = "–", "?", "no result"
_CSV_HEADER = ("set", "model", "kind", "setting", "column", "number", "percent", "source")


@dataclass(frozen=True)
class RetrievalRow:
    """A line of a retrieval table."""

    model: str
    ours: bool
    setting: str
    comparable: Recall | None
    """By the standard protocol; None: there is no result."""
    printed: Recall | None
    """As the source prints it, or by a protocol that does not compare; None: there is none."""
    corrected: bool
    """Whether ``printed`` follows another protocol than ``comparable``."""
    source: str


def retrieval_rows(results: Sequence[Result], known: Published, of_set: str) -> list[RetrievalRow]:
    """Return the lines of a set: every model of ours with a retrieval result anywhere, then the published ones."""
    rows = []
    ours = [result for result in results if isinstance(result, RetrievalResult)]
    for model in dict.fromkeys(result.model for result in ours):
        of_model = [result for result in ours if result.model == model and result.set == of_set]
        if not of_model and of_set not in known.sets:
            continue
        standard = next((result for result in of_model if result.protocol is None), None)
        other = next((result for result in of_model if result.protocol is not None), None)
        files = [
            Path(result.file).name + (f" (protocol {result.protocol})" if result.protocol else "")
            for result in of_model
        ]
        rows.append(
            RetrievalRow(
                model,
                True,
                MEASURED,
                None if standard is None else standard.numbers,
                None if other is None else other.numbers,
                other is not None,
                f"measured: {', '.join(files)}" if files else "",
            )
        )
    for row in known.rows:
        if of_set in row.printed:
            rows.append(
                RetrievalRow(
                    row.model,
                    False,
                    row.setting,
                    row.comparable[of_set],
                    row.printed[of_set],
                    of_set in row.corrected,
                    row.sources[of_set],
                )
            )
    return rows


def markdown(results: Sequence[Result], known: Published) -> str:
    """Return all tables, with what is missing and the sources below each."""
    own_sets = dict.fromkeys(result.set for result in results if isinstance(result, RetrievalResult))
    sets = [*known.sets, *(name for name in own_sets if name not in known.sets)]
    parts = [_retrieval_table(retrieval_rows(results, known, name), name, known) for name in sets]
    pairs = [result for result in results if isinstance(result, PairsResult)]
    classes = [result for result in results if isinstance(result, ClassesResult)]
    parts.append(_pairs_table(pairs, known))
    if classes:
        parts.append(_classes_table(classes))
    return "\n\n".join(parts) + "\n"


def _retrieval_table(rows: Sequence[RetrievalRow], name: str, known: Published) -> str:
    has_printed = any(row.corrected for row in rows)
    titles = [_title(key) for key in RECALL_KEYS]
    header = ["Model", "setting", *titles]
    header += [f"printed: {title}" for title in titles] if has_printed else []
    sources: dict[str, int] = {}
    lines = []
    for row in rows:
        cells = [f"**{row.model}**" if row.ours else row.model, row.setting]
        cells += _cells(row.comparable, _UNKNOWN if row.corrected else _NOT_PRINTED)
        if has_printed:
            cells += [_NOT_PRINTED] * len(RECALL_KEYS) if row.printed is None else _cells(row.printed, _NOT_PRINTED)
        number = sources.setdefault(row.source, len(sources) + 1) if row.source else 0
        lines.append([*cells, f"[{number}]" if number else ""])
    below = []
    if has_printed:
        below.append(
            "The columns in front compare with each other. Figures printed in the source with one copy of the image a "
            f"caption are {known.correction}; {_UNKNOWN}: cannot be recovered."
        )
    below.append(f"Percent. {_NOT_PRINTED}: not published.\n")
    below += [f"- {line}" for line in missing(rows, name)]
    below += [f"- [{number}] {source}" for source, number in sources.items()]
    return _section(_heading(name, known.sets.get(name)), [*header, "source"], lines, below)


def missing(rows: Sequence[RetrievalRow], name: str) -> Iterator[str]:
    """Say of each empty line of ours how it is filled."""
    ours = [row for row in rows if row.ours]
    how = "run `mmd2v eval retrieval MODEL … --json FILE`"
    if not ours:
        yield f"no result on {name}: {how} and name FILE here"
    for row in ours:
        if row.comparable is None:
            only = " by the standard protocol" if row.printed is not None else ""
            yield f"{row.model}: no result on {name}{only}: {how}"


def _pairs_table(results: Sequence[PairsResult], known: Published) -> str:
    header = ["Model", "pooling", "set", "pairs", *(_pair_title(key) for key in PAIR_KEYS), "mean"]
    lines, below = [], []
    of_models: dict[tuple[str, str], list[PairsResult]] = {}
    for result in results:
        of_models.setdefault((result.model, result.pooling), []).append(result)
    for (model, pooling), parts in of_models.items():
        for part in parts:
            cells = [_percent(part.numbers.get(key), _NOT_PRINTED) for key in (*PAIR_KEYS, "mean")]
            lines.append([f"**{model}**", pooling, part.set, f"{part.pairs:,}", *cells])
        by_set = {part.set: part for part in parts}
        absent = [name for name in known.pair_counts if name not in by_set]
        if absent:
            files = " ".join(f"{name}=FILE" for name in absent)
            below.append(
                f"- {model}, {pooling}: no result on {', '.join(absent)}: run `mmd2v eval pairs MODEL --pairs {files} "
                "… --json FILE` with all four for the mean of the 16 numbers"
            )
        else:
            mean = sum(by_set[name].numbers["mean"] for name in known.pair_counts) / len(known.pair_counts)
            blank = [""] * len(PAIR_KEYS)
            pairs = sum(by_set[name].pairs for name in known.pair_counts)
            lines.append([f"**{model}**", pooling, "mean of the 16", f"{pairs:,}", *blank, _percent(mean, "")])
    if not results:
        below.append("- no result: run `mmd2v eval pairs MODEL --pairs … --json FILE` and name FILE here")
    sizes = ", ".join(f"{name} {count:,}" for name, count in known.pair_counts.items())
    below.append(f"- Published: {known.pair_source} ({sizes})")
    return _section("Text pairs", header, lines, below)


def _classes_table(results: Sequence[ClassesResult]) -> str:
    lines = [
        [
            f"**{result.model}**",
            result.task,
            result.set,
            _percent(result.top1, _NOT_PRINTED),
            _percent(result.top5, _NOT_PRINTED),
            _percent(result.chance, _NOT_PRINTED),
        ]
        for result in results
    ]
    return _section("Classification", ["Model", "by", "set", "top-1", "top-5", "chance"], lines, ["Percent."])


def csv_text(results: Sequence[Result], known: Published) -> str:
    """Return every number as a line of its own: set, model, kind, setting, column, number, percent, source.

    ``column`` is ``comparable`` (the standard protocol; of published figures the corrected one where it had to be) or
    ``printed`` (as the source prints it).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    own_sets = [result.set for result in results if isinstance(result, RetrievalResult)]
    for name in dict.fromkeys([*known.sets, *own_sets]):
        for row in retrieval_rows(results, known, name):
            columns: Mapping[str, Recall | None] = {"comparable": row.comparable, "printed": row.printed}
            for column, numbers in columns.items():
                source = row.source
                if column == "comparable" and row.corrected and not row.ours:
                    source += f"; {known.correction}"
                for key, value in (numbers or {}).items():
                    kind = "ours" if row.ours else "published"
                    writer.writerow([name, row.model, kind, row.setting, column, key, _digits(value), source])
    for result in results:
        if isinstance(result, RetrievalResult):
            continue
        if isinstance(result, PairsResult):
            setting, numbers = f"text pairs, {result.pooling}", dict(result.numbers)
        else:
            found = {"top1": result.top1, "top5": result.top5, "chance_top1": result.chance}
            setting, numbers = result.task, {key: value for key, value in found.items() if value is not None}
        for key, value in numbers.items():
            writer.writerow(
                [result.set, result.model, "ours", setting, "comparable", key, _digits(value), Path(result.file).name]
            )
    return buffer.getvalue()


def _heading(name: str, known: PublishedSet | None) -> str:
    if known is None:
        return f"Retrieval: {name}"
    return f"{known.title}: {known.images:,} images, {known.captions:,} captions"


def _section(heading: str, header: Sequence[str], lines: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    text = [f"### {heading}", ""]
    if lines:
        text += [_line(header), "|" + "---|" * len(header), *map(_line, lines), ""]
    return "\n".join([*text, *below])


def _line(cells: Sequence[str]) -> str:
    # A bar in a model's name would end its cell.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cells(numbers: Recall | None, absent: str) -> list[str]:
    if numbers is None:
        return [_MISSING] * len(RECALL_KEYS)
    return [_percent(numbers.get(key), absent) for key in RECALL_KEYS]


def _title(key: str) -> str:
    direction, recall = key.split("_")
    return f"{_TITLES[direction]} {recall}" if recall == "R@1" else recall


def _pair_title(key: str) -> str:
    side, _, recall = key.rpartition("_")
    return f"{_SIDES[side]} {recall}"


def _percent(value: float | None, absent: str) -> str:
    return absent if value is None else f"{100 * value:.2f}"


def _digits(value: float) -> str:
    return f"{100 * value:.4f}"


__all__ = ["DIRECTIONS", "MEASURED", "RetrievalRow", "csv_text", "markdown", "missing", "retrieval_rows"]
