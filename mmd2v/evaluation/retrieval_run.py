"""Image–text retrieval of any model on any captioned images, alone or under a launcher: `mmd2v eval retrieval`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mmd2v.distributed.coordination import from_main_rank, on_every_rank, shared_error
from mmd2v.distributed.environment import World, initialize, shutdown
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.errors import UserError
from mmd2v.evaluation.bootstrap import CONFIDENCE, Bootstrap
from mmd2v.evaluation.caption_sets import CaptionSet, open_captions
from mmd2v.evaluation.dump import check_dump, write_dump
from mmd2v.evaluation.embedding_cache import cached_or, check_cache
from mmd2v.evaluation.models import RetrievalModel, open_model
from mmd2v.evaluation.protocols import DEFAULT_PROTOCOL, Protocol, ranked_set
from mmd2v.evaluation.public_sets import check_public, ids_digest
from mmd2v.evaluation.retrieval import RECALL_AT, Expected, Metrics, check_counts, metrics_over_ranks
from mmd2v.evaluation.set_encoding import EncodedCaptions, EncodesIds, Tell, describe_set, encode_captions
from mmd2v.files import check_output
from mmd2v.inference import Encoder, Precision
from mmd2v.progress import Progress
from mmd2v.report.recall_table import chance_row, recall_table

_DIRECTIONS = ("i2t", "t2i")


@dataclass(frozen=True)
class RetrievalData:
    """What is measured on."""

    data: Sequence[str]
    """One caption file, or shards."""
    images: Sequence[str] = ()
    """Folders, tars or folders of tars with the images of a caption file; none: its own folder."""
    splits: Sequence[str] = ()
    limit: int | None = None
    """The first so many images."""
    expected: Expected = (None, None)
    allow_copies: bool = False
    """Whether one image may go by two ids."""


@dataclass(frozen=True)
class HowMeasured:
    """How it is measured."""

    protocol: Protocol = DEFAULT_PROTOCOL
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    batch_size: int = 128
    workers: int | None = None
    """Threads of a rank that decode images; None: one a core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    cache: Path | None = None
    """Folder of embeddings of earlier evaluations."""
    rank_timeout: float = 120.0
    """Seconds without a sign of life after which a rank counts as frozen."""


@dataclass(frozen=True)
class RetrievalReport:
    """Metrics and what they were measured with."""

    model: str
    data: list[str]
    splits: list[str]
    public_set: str | None
    """Name of the public test set that it is, by its ids."""
    protocol: Protocol
    preprocessing: str
    ids_sha256: str
    bootstrap: Bootstrap
    metrics: Metrics

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        return {
            "model": self.model,
            "data": self.data,
            "split": self.splits,
            "public_set": self.public_set,
            "protocol": self.protocol,
            "preprocessing": self.preprocessing,
            "ids_sha256": self.ids_sha256,
            "bootstrap_resamples": self.bootstrap.resamples,
            "bootstrap_seed": self.bootstrap.seed,
            "confidence": CONFIDENCE,
            **self.metrics,
        }

    def text(self) -> str:
        """Return what a person reads: counts, preprocessing, recall beside the chance level and how sure it is."""
        m = self.metrics
        dropped, images = int(m["duplicate_images"]), int(m["images"])
        split = f" ({', '.join(self.splits)})" if self.splits else ""
        lines = [
            f"{', '.join(self.data)}{split}: {images:,} images, {int(m['captions']):,} captions"
            + (f" ({dropped:,} further images had an id that had come before)" if dropped else ""),
            self.preprocessing,
            *([f"this is {self.public_set}: its ids and both counts"] if self.public_set else []),
            f"protocol: {self.protocol}{self._protocol_warning()}",
            f"ids (SHA-256): {self.ids_sha256}",
            "",
            recall_table({"chance": chance_row(m), self.model: m}),
            "",
            *self._intervals(),
            f"median rank: image → text {m['i2t_median_rank']:g}, text → image {m['t2i_median_rank']:g}; mean "
            f"reciprocal rank: {m['i2t_MRR']:.4f}, {m['t2i_MRR']:.4f}",
        ]
        shuffled = [f"{100 * m[f'shuffled_{d}_R@{k}']:.2f}" for d in _DIRECTIONS for k in RECALL_AT]
        lines.append(f"self-check: shuffled pairs score {' '.join(shuffled)}, which is chance")
        open_to_ties = [
            f"{key} {100 * m[f'{key}_worst']:.2f} to {100 * m[f'{key}_best']:.2f}"
            for key in (f"{direction}_R@{k}" for direction in _DIRECTIONS for k in RECALL_AT)
            if f"{key}_worst" in m
        ]
        if open_to_ties:
            lines.append(f"equal scores, ordered by index, leave open: {', '.join(open_to_ties)}")
        return "\n".join(lines)

    def _protocol_warning(self) -> str:
        if self.protocol == "karpathy":
            return ""
        copies = int(self.metrics["image_candidates"])
        return f", every caption with an image copy of its own ({copies:,} candidates): not the published measure"

    def _intervals(self) -> list[str]:
        if not self.bootstrap.resamples:
            return []
        sides = [
            " ".join(
                f"{100 * self.metrics[f'{d}_R@{k}_low']:.2f}–{100 * self.metrics[f'{d}_R@{k}_high']:.2f}"
                for k in RECALL_AT
            )
            for d in _DIRECTIONS
        ]
        how = f"{self.bootstrap.resamples:,} resamples of the images with their captions, seed {self.bootstrap.seed}"
        return [f"{100 * CONFIDENCE:.0f} % intervals: {'; '.join(sides)} ({how})"]


def evaluate_retrieval(
    model: str | Path | RetrievalModel,
    data: RetrievalData,
    how: HowMeasured | None = None,
    *,
    out: str | Path | None = None,
    dump: str | Path | None = None,
) -> RetrievalReport | None:
    """Measure a model, or what `open_model` opens, on every rank of a launcher; ranks other than the first get None.

    ``out`` is the file the caller will write the numbers to, ``dump`` a folder that receives embeddings, ids and
    positives; that both can be written is checked first.
    Raises UserError for a model without image and text, unreadable data, counts or ids other than expected, embeddings
    of which there is no recall, or an output that cannot be written; under a launcher on every rank, but on the others
    than the first as `ReportedByMainRank`, unless it is a rank's own failure to join.
    """
    how = how or HowMeasured()
    world = initialize(how.device)
    try:
        with Pulse(world, how.rank_timeout) as pulse:
            dump = None if dump is None else Path(dump)
            from_main_rank(lambda: _check_arguments(data, how, out, dump))
            if how.cache is not None and not isinstance(model, str | Path):
                raise shared_error("cache: needs a model by its name, found an object, whose content is not known")
            return _measure(model, data, how, world, pulse.at, dump)
    finally:
        shutdown()


def _measure(
    model: str | Path | RetrievalModel,
    data: RetrievalData,
    how: HowMeasured,
    world: World,
    tell: Tell,
    dump: Path | None,
) -> RetrievalReport | None:
    tell(0, "opening the model and the data")

    def prepare() -> tuple[RetrievalModel, CaptionSet]:
        opened = open_model(model, world.device, how.precision) if isinstance(model, str | Path) else model
        if isinstance(opened, Encoder):
            _check_modalities(opened, model)
        source = opened.config.data.source if isinstance(opened, Encoder) else None
        needs_images = not isinstance(opened, EncodesIds)
        return opened, open_captions(
            data.data, data.images, data.splits, data.limit, source=source, find_images=needs_images
        )

    opened, captions = on_every_rank(prepare)
    encoded = _encode(model, opened, captions, data, how, world, tell)
    described = encoded.described
    check_counts(len(described.ids), len(described.captions), data.expected)
    public = on_every_rank(
        lambda: check_public(data.data, data.splits, described.ids, len(described.captions), data.limit)
    )
    tell(0, "ranking")
    owners = torch.tensor(described.caption_image, device=encoded.image_ME.device)
    ranked = on_every_rank(lambda: ranked_set(encoded.image_ME, encoded.text_NE, owners, how.protocol))
    metrics = metrics_over_ranks(ranked, how.bootstrap, self_check=True, seed=how.bootstrap.seed)
    metrics |= {
        "images": len(described.ids),
        "image_candidates": len(ranked.image_IE),
        "duplicate_images": described.duplicates,
    }
    report = RetrievalReport(
        opened.name,
        list(data.data),
        list(data.splits),
        public,
        how.protocol,
        opened.preprocessing(),
        ids_digest(described.ids),
        how.bootstrap,
        metrics,
    )
    tell(0, "writing")
    if dump is not None:
        from_main_rank(lambda: write_dump(dump, encoded, report.record()))
    return report if world.is_main else None


def _encode(
    model: str | Path | RetrievalModel,
    opened: RetrievalModel,
    captions: CaptionSet,
    data: RetrievalData,
    how: HowMeasured,
    world: World,
    tell: Tell,
) -> EncodedCaptions:
    batches = -(-len(captions) // how.batch_size)
    with Progress("encoding", -(-batches // world.size), unit="batches") if world.is_main else nullcontext() as bar:

        def told(batch: int, what: str) -> None:
            tell(batch, what)
            if bar is not None:
                bar.advance(batch - bar.done)

        def encode() -> EncodedCaptions:
            found = encode_captions(
                opened, captions, how.batch_size, told, workers=how.workers, allow_copies=data.allow_copies
            )
            told(-(-batches // world.size), "gathering")
            return found

        if how.cache is None:
            return encode()
        assert isinstance(model, str | Path)  # has been checked
        described = describe_set(captions, how.batch_size, tell, allow_copies=data.allow_copies)
        tell(0, "looking into the cache")
        return cached_or(how.cache, model, opened, described, encode)


def _check_arguments(data: RetrievalData, how: HowMeasured, out: str | Path | None, dump: Path | None) -> None:
    for flag, value, least in (
        ("--limit", data.limit, 1),
        ("--batch-size", how.batch_size, 1),
        ("--workers", how.workers, 0),
        ("--resamples", how.bootstrap.resamples, 0),
        ("--seed", how.bootstrap.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag}: found {value}, expected at least {least}")
    if out is not None:
        check_output("--json", out)
    if dump is not None:
        check_dump(dump)
    if how.cache is not None:
        check_cache(how.cache)


def _check_modalities(encoder: Encoder, model: Any) -> None:
    kinds = encoder.student.inputs.values()
    if "image" not in kinds or "text" not in kinds:
        where = model if isinstance(model, str | Path) else encoder.name
        raise UserError(
            f"{where}: retrieval needs image and text, but this encoder has {', '.join(encoder.student.inputs)}"
        )
