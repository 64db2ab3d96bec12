"""Retrieval of an exported encoder on a data set of shards: what `mmd2v eval retrieval` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmd2v.config.schema import ShardsConfig
from mmd2v.data.batch import Batch
from mmd2v.data.stream import eval_loader
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.distributed.environment import initialize, shutdown
from mmd2v.errors import UserError
from mmd2v.evaluation.retrieval import RECALL_AT, Metrics, evaluate
from mmd2v.files import check_output
from mmd2v.inference import Encoder, Precision, load
from mmd2v.models.student import StudentOutput
from mmd2v.progress import track
from mmd2v.report.recall_table import chance_row, recall_table


@dataclass(frozen=True)
class RetrievalReport:
    """Metrics and what they were measured with."""

    model: str
    shards: list[str]
    preprocessing: str
    metrics: Metrics

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        described = {"model": self.model, "shards": self.shards, "preprocessing": self.preprocessing}
        return {**described, **self.metrics}

    def text(self) -> str:
        """Return what a person reads: counts, preprocessing, recall beside the chance level."""
        m = self.metrics
        dropped = m["duplicate_images"]
        lines = [
            f"{', '.join(self.shards)}: {m['images']:,} images, {m['captions']:,} captions"
            + (f" ({dropped:,} further images had an id that had come before)" if dropped else ""),
            self.preprocessing,
            "",
            recall_table({"chance": chance_row(m), self.model: m}),
            "",
            f"median rank: image → text {m['i2t_median_rank']:g}, text → image {m['t2i_median_rank']:g}",
        ]
        open_to_ties = [
            f"{key} {100 * m[f'{key}_worst']:.2f} to {100 * m[f'{key}_best']:.2f}"
            for key in (f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in RECALL_AT)
            if f"{key}_worst" in m
        ]
        if open_to_ties:
            lines.append(f"equal scores, ordered by index, leave open: {', '.join(open_to_ties)}")
        return "\n".join(lines)


def evaluate_export(
    folder: str | Path,
    shards: list[str],
    *,
    limit: int | None = None,
    expected: tuple[int | None, int | None] = (None, None),
    batch_size: int = 128,
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision = "fp32",
    out: str | Path | None = None,
) -> RetrievalReport | None:
    """Measure the export in ``folder``, alone or on every rank of a launcher; ranks other than the first get None.

    ``out`` is the file the caller will write the numbers to; that it can be written is checked first.
    Raises UserError for an export without image and text, unreadable shards, counts other than ``expected``, or an
    ``out`` that cannot be written; under a launcher on every rank, but on the others than the first as
    `ReportedByMainRank`, unless it is a rank's own failure to join.
    """
    world = initialize(device)
    try:
        from_main_rank(lambda: _check_arguments(limit, batch_size, out))

        def prepare() -> tuple[Encoder, dict[str, str], Iterable[Batch]]:
            encoder = load(folder, world.device, precision)
            names = {kind: _modality(encoder, kind, folder) for kind in ("image", "text")}
            data = encoder.config.data
            if workers is not None:
                data = data.model_copy(update={"workers": workers})
            loader = eval_loader(
                data,
                shards=ShardsConfig(shards=shards, limit=limit),
                tokenizer=encoder.tokenizer,
                batch_size=batch_size,
                rank=world.rank,
                world_size=world.size,
            )
            return encoder, names, loader

        encoder, names, loader = on_every_rank(prepare)

        def encode(batch: Batch) -> StudentOutput:
            with encoder.autocast():
                return encoder.student(batch, tuple(names.values()))

        batches = track(loader, "encoding", unit="batches") if world.is_main else loader
        metrics = evaluate(encode, batches, world, **names, expected=expected)
    finally:
        shutdown()
    if not world.is_main:
        return None
    return RetrievalReport(encoder.config.name, shards, encoder.preprocessing(), metrics)


def _check_arguments(limit: int | None, batch_size: int, out: str | Path | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"--limit: found {limit}, expected at least 1")
    if batch_size < 1:
        raise UserError(f"--batch-size: found {batch_size}, expected at least 1")
    if out is not None:
        check_output("--json", out)


def _modality(encoder: Encoder, kind: str, folder: str | Path) -> str:
    for name, of_kind in encoder.student.inputs.items():
        if of_kind == kind:
            return name
    raise UserError(
        f"{folder}: retrieval needs image and text, but this encoder has {', '.join(encoder.student.inputs)}"
    )
