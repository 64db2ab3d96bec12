"""Symmetric contrastive loss (InfoNCE) between images and captions, several captions an image allowed.

Shapes: b images and n captions of this rank, B and N of all ranks, D width of the embeddings.
Source: CLIP (Radford et al. 2021); with several captions an image, the image's term is the mean over its captions of
their negative log-likelihood, as in supervised contrastive learning (Khosla et al. 2020, "out" form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmd2v_kernels.logit_chunks import CHUNK
from mmd2v_kernels.pair_softmax import Positives, pair_softmax

__all__ = ["ContrastiveWeights", "contrastive"]


class ContrastiveWeights(NamedTuple):
    """1 for what counts, 0 for what is neither a query nor a candidate."""

    image_b: torch.Tensor
    text_n: torch.Tensor
    image_B: torch.Tensor
    text_N: torch.Tensor


def contrastive(
    image_bD: torch.Tensor,
    text_nD: torch.Tensor,
    image_BD: torch.Tensor,
    text_ND: torch.Tensor,
    owner_n: torch.Tensor,
    owner_N: torch.Tensor,
    image_offset: int,
    scale: torch.Tensor,
    label_smoothing: float = 0.0,
    weights: ContrastiveWeights | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the scalar loss of this rank's rows: half the mean over its images plus half the mean over its captions.

    ``image_bD`` and ``text_nD`` are L2-normalised embeddings of this rank; ``image_BD`` and ``text_ND`` those of all
    ranks (gathered with gradient; the same tensors on one rank). ``owner_n`` and ``owner_N`` (int64) give each
    caption's row in ``image_BD``; ``image_offset`` is the row in ``image_BD`` of this rank's first image. ``scale``
    is the inverse temperature. ``weights`` leaves rows out: the means still divide by all rows, so that the loss is the
    same however the rows lie on ranks. Logits are computed in fp32, about
    ``chunk`` at once: no B × N matrix is ever in memory.
    """
    image_b, text_n, image_B, text_N = weights or (None, None, None, None)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round what is summed to bf16
        images, captions = len(image_bD), len(text_nD)
        # What one of its captions adds to the mean logit of an image's positives; 0 for images of other ranks.
        row_N = owner_N - image_offset
        is_own_N = (row_N >= 0) & (row_N < images)
        row_N = row_N.clamp(0, images - 1)
        captions_b = torch.zeros(images, device=row_N.device).index_add_(0, row_N, is_own_N.float())
        share_N = is_own_N / captions_b.clamp(min=1)[row_N]

        image_weight_b = _weight(image_b, images, row_N.device)
        text_weight_n = _weight(text_n, captions, row_N.device)
        target = 1 - label_smoothing
        image_lse_b = image_weight_b * (target * captions_b.clamp(max=1) + label_smoothing)
        positive_N = target * share_N * image_weight_b[row_N]
        if image_BD is image_bD and text_ND is text_nD:  # one rank: each logit serves both directions
            pairs = Positives(torch.arange(captions, device=row_N.device), owner_n, positive_N + target * text_weight_n)
            loss = pair_softmax(text_nD, image_bD, scale, pairs, text_weight_n, image_lse_b, text_n, image_b, chunk)
        else:
            own = torch.arange(captions, device=row_N.device)
            of_images = Positives(owner_N - image_offset, torch.arange(len(owner_N), device=row_N.device), positive_N)
            of_captions = Positives(own, owner_n, target * text_weight_n)
            loss = pair_softmax(image_bD, text_ND, scale, of_images, image_lse_b, column_seen_M=text_N, chunk=chunk)
            loss = loss + pair_softmax(
                text_nD, image_BD, scale, of_captions, text_weight_n, column_seen_M=image_B, chunk=chunk
            )
        if label_smoothing:
            even = _even(image_weight_b, image_bD, text_ND, text_N) + _even(text_weight_n, text_nD, image_BD, image_B)
            loss = loss - label_smoothing * scale.float().reshape(()) * even
        return loss / 2


def _weight(weight: torch.Tensor | None, queries: int, device: torch.device) -> torch.Tensor:
    """[q] what a query's log-likelihood counts in the mean over all of them."""
    return torch.full((queries,), 1 / queries, device=device) if weight is None else weight.float() / queries


def _even(
    weight_q: torch.Tensor, query_qD: torch.Tensor, candidate_cD: torch.Tensor, seen_c: torch.Tensor | None
) -> torch.Tensor:
    """Return Σ weight · (mean product of the query with the candidates that count)."""
    even_c = torch.ones_like(candidate_cD[:, 0], dtype=torch.float32) if seen_c is None else seen_c.float()
    even_c = even_c / even_c.sum().clamp(min=1)
    return (weight_q @ query_qD.float()) @ (even_c @ candidate_cD.float())
