"""Text-pair retrieval: of two sentences that say the same, each is to find the other among all of its side.

The i-th sentence is right for the i-th one alone: an equal sentence of another pair counts as a miss, and ranks are
by score, then lowest index (`mmd2v_kernels`). All numbers are fractions.

Shapes: N pairs, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmd2v.data.pair_files import PairFormat, TextPairs, read_pairs
from mmd2v.errors import UserError, nearest
from mmd2v.evaluation.chance import chance_recall
from mmd2v.evaluation.retrieval import Metrics, recall_bounds
from mmd2v.progress import Progress
from mmd2v.report.published import published
from mmd2v_kernels import count_ahead

PAIR_RECALL_AT = (1, 5)
PAIR_LIMIT = 25_000
"""Positive pairs of a file that are used: the first ones, as in the published numbers."""

DIRECTIONS = {"second_to_first": "sentence 2 → sentence 1", "first_to_second": "sentence 1 → sentence 2"}
"""Query → memory bank."""

_CHUNK = 2048

EncodeTexts = Callable[[Sequence[str]], torch.Tensor]
"""N texts → [N, D]"""


@dataclass(frozen=True)
class PairResult:
    """Metrics and what they were measured on."""

    pairs: int
    broken: int
    """Rows of the file that were left out, see `TextPairs`."""
    format: str
    metrics: Metrics

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        return {"pairs": self.pairs, "broken_rows": self.broken, "format": self.format, **self.metrics}

    def text(self) -> str:
        """Return what a person reads: counts and recall in percent beside the chance level."""
        m = self.metrics
        left_out = f" ({self.broken:,} broken rows left out)" if self.broken else ""
        lines = [f"{self.pairs:,} positive pairs, {self.format}{left_out}", ""]
        width = max(map(len, DIRECTIONS.values()))
        lines.append(" " * width + "".join(f"{f'R@{k}':>8}" for k in PAIR_RECALL_AT))
        rows = {"chance": [m[f"chance_R@{k}"] for k in PAIR_RECALL_AT]}
        rows |= {label: [m[f"{name}_R@{k}"] for k in PAIR_RECALL_AT] for name, label in DIRECTIONS.items()}
        lines += [f"{label:<{width}}" + "".join(f"{100 * value:8.2f}" for value in row) for label, row in rows.items()]
        lines += ["", f"mean of the {len(DIRECTIONS) * len(PAIR_RECALL_AT)} numbers: {100 * m['mean']:.2f}"]
        open_to_ties = [
            f"{key} {100 * m[f'{key}_worst']:.2f} to {100 * m[f'{key}_best']:.2f}"
            for key in (f"{name}_R@{k}" for name in DIRECTIONS for k in PAIR_RECALL_AT)
            if f"{key}_worst" in m
        ]
        if open_to_ties:
            lines.append(f"equal scores, ordered by index, leave open: {', '.join(open_to_ties)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PairsReport:
    """Several files, measured alike."""

    results: Mapping[str, PairResult]
    """Name of a set → its result"""

    @property
    def mean(self) -> float:
        """The mean of all their numbers: of the 16 if these are the four sets."""
        return sum(result.metrics["mean"] for result in self.results.values()) / len(self.results)

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        return {"sets": {name: result.record() for name, result in self.results.items()}, "mean": self.mean}

    def text(self) -> str:
        """Return what a person reads."""
        parts = [f"{name}: {result.text()}" for name, result in self.results.items()]
        numbers = len(self.results) * len(DIRECTIONS) * len(PAIR_RECALL_AT)
        return "\n\n".join([*parts, f"mean of the {numbers} numbers of all sets: {100 * self.mean:.2f}"])


def pair_metrics(first_ND: torch.Tensor, second_ND: torch.Tensor) -> Metrics:
    """Return recall of pairs of rows, compared by cosine (rows are L2-normalised here).

    Keys: ``second_to_first_R@1``, ``_R@5`` (queries are the second sentences), ``first_to_second_R@1``, ``_R@5``, the
    ``mean`` of the four, ``chance_R@1``, ``chance_R@5``; and bounds where equal scores leave a recall open, as in
    `retrieval_metrics`. Raises UserError for other shapes or embeddings that are not finite.
    """
    if first_ND.shape != second_ND.shape or first_ND.ndim != 2 or len(first_ND) == 0:
        raise UserError(
            f"text pairs: found {list(first_ND.shape)} and {list(second_ND.shape)}, expected one row a sentence"
        )
    pairs_N2 = torch.arange(len(first_ND), device=first_ND.device)[:, None].expand(-1, 2)
    try:
        counts = count_ahead(F.normalize(second_ND.float(), dim=-1), F.normalize(first_ND.float(), dim=-1), pairs_N2)
    except ValueError as error:
        raise UserError(f"text pairs: {error}") from error
    metrics: Metrics = {}
    for name, count_3N in zip(DIRECTIONS, counts, strict=True):
        metrics |= recall_bounds(name, count_3N.cpu(), PAIR_RECALL_AT)
    recalls = [metrics[f"{name}_R@{k}"] for name in DIRECTIONS for k in PAIR_RECALL_AT]
    metrics["mean"] = sum(recalls) / len(recalls)
    for k in PAIR_RECALL_AT:
        metrics[f"chance_R@{k}"] = chance_recall(len(first_ND), [1], k)
    return metrics


def pairs_of_file(
    encode: EncodeTexts, path: str | Path, format: PairFormat = "auto", limit: int | None = PAIR_LIMIT
) -> PairResult:
    """Measure the first ``limit`` positive pairs of a file. Raises UserError as `read_pairs` and `pair_metrics` do."""
    pairs = read_pairs(path, format, limit)
    first_ND, second_ND = encode_pairs(encode, pairs)
    return PairResult(len(pairs), pairs.broken, pairs.format, pair_metrics(first_ND, second_ND))


def pairs_of_files(
    encode: EncodeTexts,
    files: Mapping[str, Path],
    format: PairFormat = "auto",
    limit: int = PAIR_LIMIT,
) -> PairsReport:
    """Measure files by the names of their sets.

    ``mrpc_train`` and ``mrpc_test`` are of format ``mrpc``, others of ``format``. The sets of the published protocol
    (``qqp_train``, ``qqp_dev``, ``mrpc_train``, ``mrpc_test``) must have its numbers of pairs, or ``limit`` if that is
    less. All are counted before the first one is encoded. Raises UserError as `read_pairs` and `pair_metrics` do, or
    for another count.
    """
    sets, known = {}, published().pair_counts
    for name, path in files.items():
        pairs = read_pairs(path, "mrpc" if name in known and name.startswith("mrpc") else format, limit)
        expected = min(limit, known.get(name, len(pairs)))
        if len(pairs) != expected:
            raise UserError(
                f"--pairs: {path} holds {len(pairs):,} positive pairs (format {pairs.format}), expected {expected:,} "
                f"of {name}; read with another --format, or give it another name"
            )
        sets[name] = pairs
    return PairsReport(
        {
            name: PairResult(len(pairs), pairs.broken, pairs.format, pair_metrics(*encode_pairs(encode, pairs)))
            for name, pairs in sets.items()
        }
    )


def named_files(items: Sequence[str]) -> dict[str, Path]:
    """Split ``NAME=FILE``; a file alone goes by its own name. Raises UserError for a name that comes twice."""
    known = published().pair_counts
    files: dict[str, Path] = {}
    for item in items:
        name, is_named, file = item.partition("=")
        if not is_named or Path(item).exists():
            name, file = Path(item).name, item
        elif name not in known and (hint := nearest(name, known)):
            raise UserError(
                f"--pairs: unknown set '{name}'.{hint} A name unlike {', '.join(known)} can be chosen freely"
            )
        if not name or not file or name in files:
            raise UserError(f"--pairs: found '{item}', expected FILE or NAME=FILE, each name once")
        files[name] = Path(file)
    return files


def encode_pairs(encode: EncodeTexts, pairs: TextPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of both sides, [N, D] each, on the CPU; a sentence that occurs often is encoded once."""
    texts = list(dict.fromkeys([*pairs.first, *pairs.second]))
    rows = []
    with Progress("encoding", len(texts), unit="sentences") as progress:
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            rows.append(encode(chunk).float().cpu())
            progress.advance(len(chunk))
    table_UD = torch.cat(rows)
    place = {text: number for number, text in enumerate(texts)}
    first, second = (torch.tensor([place[text] for text in side]) for side in (pairs.first, pairs.second))
    return table_UD[first], table_UD[second]
