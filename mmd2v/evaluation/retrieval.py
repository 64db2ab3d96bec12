"""Image–text retrieval: recall at 1, 5 and 10 in both directions, exact, with any number of captions an image.

Image→text: any own caption among the k nearest, averaged over images. Text→image: the image among the k nearest,
averaged over captions (Karpathy & Fei-Fei 2015, as CLIP_benchmark and BEiT-3 compute it). All numbers are fractions.

Shapes: M images, N captions, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import gather_variable, rank, world_size
from mmd2v.distributed.coordination import shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.evaluation.bootstrap import Bootstrap, recall_intervals
from mmd2v.evaluation.chance import chance_recall
from mmd2v.evaluation.encoding import Encode, encode_set
from mmd2v.evaluation.protocols import RankedSet, ranked_set
from mmd2v.evaluation.self_check import check_chance, shuffled_items
from mmd2v_kernels import RankCounts, count_ahead

RECALL_AT = (1, 5, 10)
Metrics = dict[str, float]
Expected = tuple[int | None, int | None]
"""Images and captions that a set must have; None: any number."""


def retrieval_metrics(
    image_embeddings_ME: torch.Tensor, text_embeddings_NE: torch.Tensor, caption_image_N: torch.Tensor
) -> Metrics:
    """Return the metrics of L2-normalised embeddings held by one process.

    ``caption_image_N`` is int64 [N], the row of the image each caption describes. Keys: ``i2t_R@1`` … ``t2i_R@10``;
    ``i2t_median_rank``, ``t2i_median_rank`` (one-based); ``i2t_MRR``, ``t2i_MRR`` (mean of 1 / rank);
    ``chance_i2t_R@1`` …; ``images``, ``captions``. Where equal scores leave a recall open, ``i2t_R@1_worst`` and
    ``i2t_R@1_best`` and their like bound it over all orders of ties.
    Images without caption are candidates but no queries. Raises UserError for embeddings that are not finite or
    indices that do not fit.
    """
    positives = _positives(image_embeddings_ME, text_embeddings_NE, caption_image_N)
    try:
        counts = count_ahead(text_embeddings_NE, image_embeddings_ME, positives)
    except ValueError as error:
        raise UserError(f"evaluation: {error}") from error
    return _metrics(counts, caption_image_N, len(image_embeddings_ME))


def evaluate(
    student: Encode,
    loader: Iterable[Batch],
    world: World | None = None,
    *,
    image: str = "image",
    text: str = "text",
    expected: Expected = (None, None),
) -> Metrics:
    """Encode a set over all ranks and return its `retrieval_metrics`, the same on every rank.

    ``student(batch)`` gives embeddings by modality (a `Student`, or any callable that returns such an output) for a
    batch on ``world.device``; ``loader`` yields this rank's slice, every image once. ``image`` and ``text`` name the
    modalities. ``expected`` are the numbers of images and captions the set must have. Every rank must call it; each
    ranks its share of the captions. Adds ``duplicate_images`` to the metrics.
    Raises UserError, on every rank, for unreadable data, embeddings that are not finite, or other counts.
    """
    device = torch.device("cpu") if world is None else world.device
    encoded = encode_set(student, loader, device, image=image, text=text)
    check_counts(len(encoded.image_ME), len(encoded.text_NE), expected)
    metrics = metrics_over_ranks(ranked_set(encoded.image_ME, encoded.text_NE, encoded.caption_image_N))
    return {**metrics, "duplicate_images": encoded.duplicates}


def check_counts(images: int, captions: int, expected: Expected) -> None:
    """Raise UserError, on every rank, for other numbers than ``expected``."""
    for what, number, wanted in zip(("images", "captions"), (images, captions), expected, strict=True):
        if wanted is not None and number != wanted:
            raise shared_error(f"evaluation: found {number} {what}, expected {wanted}")


def metrics_over_ranks(
    ranked: RankedSet, bootstrap: Bootstrap | None = None, *, self_check: bool = False, seed: int = 0
) -> Metrics:
    """Return the `retrieval_metrics` of embeddings that all ranks hold whole; each ranks its share of the captions.

    ``bootstrap`` adds ``i2t_R@1_low``, ``_high`` and their like, the bounds of the interval. ``self_check`` adds
    ``shuffled_i2t_R@1`` and its like, of captions dealt to wrong images by ``seed``. Every rank must call it.
    Raises UserError, on every rank, for embeddings that are not finite or of two widths, and where shuffled pairs
    score otherwise than by chance.
    """
    counts = _count_over_ranks(ranked, ranked.caption_item_N)
    items = len(ranked.image_IE)
    metrics = _metrics(counts, ranked.caption_item_N, items)
    if bootstrap is not None and bootstrap.resamples:
        metrics |= _intervals(counts, ranked, bootstrap)
    if self_check:
        wrong_N = shuffled_items(ranked.caption_item_N, items, seed)
        shuffled = _metrics(_count_over_ranks(ranked, wrong_N), wrong_N, items)
        # As many items have one embedding as an image has captions, where each caption owns a copy.
        together = int(torch.bincount(ranked.unit_of_caption_N).max())
        described = int((torch.bincount(wrong_N, minlength=items) > 0).sum())
        for direction, queries in (("i2t", described), ("t2i", len(wrong_N))):
            for k in RECALL_AT:
                key = f"{direction}_R@{k}"
                check_chance(key, shuffled[key], shuffled[f"chance_{key}"], queries, together)
                metrics[f"shuffled_{key}"] = shuffled[key]
    return metrics


def _count_over_ranks(ranked: RankedSet, caption_item_N: torch.Tensor) -> RankCounts:
    positives = _positives(ranked.image_IE, ranked.text_NE, caption_item_N)
    n = len(ranked.text_NE)
    share = n * rank() // world_size(), n * (rank() + 1) // world_size()
    try:
        own = count_ahead(ranked.text_NE, ranked.image_IE, positives, rows=share)
    except ValueError as error:  # all ranks hold the same embeddings
        raise shared_error(f"evaluation: {error}") from error
    # A row is ranked by one rank alone; every rank adds to the columns.
    return RankCounts(
        gather_variable(own.row[:, share[0] : share[1]].t()).t(), gather_variable(own.column[None]).sum(0)
    )


def _intervals(counts: RankCounts, ranked: RankedSet, bootstrap: Bootstrap) -> Metrics:
    described_I = torch.bincount(ranked.caption_item_N, minlength=len(ranked.image_IE)) > 0
    sides = {
        "i2t": (counts.column[:, described_I.to(counts.column.device)], ranked.unit_of_item_I[described_I]),
        "t2i": (counts.row, ranked.unit_of_caption_N),
    }
    limits = torch.tensor(RECALL_AT)
    hits = {
        name: (((count[0] + count[1]).cpu()[:, None] < limits).numpy(), unit.cpu().numpy())
        for name, (count, unit) in sides.items()
    }
    images = int(ranked.unit_of_item_I.max()) + 1
    metrics: Metrics = {}
    for name, bounds_2K in recall_intervals(hits, images, bootstrap).items():
        for k, low, high in zip(RECALL_AT, *bounds_2K.tolist(), strict=True):
            metrics[f"{name}_R@{k}_low"], metrics[f"{name}_R@{k}_high"] = low, high
    return metrics


def _positives(image_ME: torch.Tensor, text_NE: torch.Tensor, caption_image_N: torch.Tensor) -> torch.Tensor:
    """int64 [N, 2]: (caption, its image)."""
    m, n = len(image_ME), len(text_NE)
    if caption_image_N.shape != (n,):
        raise UserError(f"evaluation: {list(caption_image_N.shape)} image indices for {n} captions")
    if n == 0 or m == 0:
        raise UserError(f"evaluation: retrieval needs images and captions, found {m} and {n}")
    low, high = int(caption_image_N.min()), int(caption_image_N.max())
    if low < 0 or high >= m:
        raise UserError(f"evaluation: captions name images {low}..{high}, but there are images 0..{m - 1}")
    return torch.stack([torch.arange(n, device=caption_image_N.device), caption_image_N.long()], dim=1)


def _metrics(counts: RankCounts, caption_image_N: torch.Tensor, images: int) -> Metrics:
    captions_M = torch.bincount(caption_image_N, minlength=images).cpu()
    described = captions_M > 0
    sides = {
        # direction: counts of its queries, candidates, right answers of each query
        "i2t": (counts.column.cpu()[:, described], len(caption_image_N), captions_M[described].tolist()),
        "t2i": (counts.row.cpu(), images, [1] * len(caption_image_N)),
    }
    metrics: Metrics = {}
    for name, (count, _, _) in sides.items():
        metrics |= recall_bounds(name, count, RECALL_AT)
    for name, (count, _, _) in sides.items():
        ranks = (count[0] + count[1] + 1).double()
        metrics[f"{name}_median_rank"] = ranks.quantile(0.5).item()
        metrics[f"{name}_MRR"] = (1 / ranks).mean().item()
    for name, (_, candidates, positives) in sides.items():
        for k in RECALL_AT:
            metrics[f"chance_{name}_R@{k}"] = chance_recall(candidates, positives, k)
    return {**metrics, "images": images, "captions": len(caption_image_N)}


def recall_bounds(name: str, count_3N: torch.Tensor, at: Iterable[int]) -> Metrics:
    """Return ``NAME_R@k`` of one side of `RankCounts`; ``_worst`` and ``_best`` where equal scores leave it open."""
    rank_, best, worst = count_3N[0] + count_3N[1], count_3N[0], count_3N.sum(0)
    metrics: Metrics = {}
    for k in at:
        metrics[f"{name}_R@{k}"] = _share_below(rank_, k)
        if _share_below(worst, k) != _share_below(best, k):
            metrics[f"{name}_R@{k}_worst"] = _share_below(worst, k)
            metrics[f"{name}_R@{k}_best"] = _share_below(best, k)
    return metrics


def _share_below(ranks: torch.Tensor, k: int) -> float:
    return (ranks < k).double().mean().item()
