"""Symmetric contrastive loss (InfoNCE) between images and captions, several captions an image allowed.

Shapes: b images and n captions of this rank, B and N of all ranks, D width of the embeddings.
Source: CLIP (Radford et al. 2021); with several captions an image, the image's term is the mean over its captions of
their negative log-likelihood, as in supervised contrastive learning (Khosla et al. 2020, "out" form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmd2v_kernels.logit_chunks import CHUNK, check_rows
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
    ``chunk`` at once: no B × N matrix is ever in memory. Raises ValueError without an image or without a caption.
    """
    check_rows(image_bD, text_nD)
    image_b, text_n, image_B, text_N = weights or (None, None, None, None)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round what is summed to bf16
        row_N = owner_N - image_offset
        terms = Terms.of(row_N, len(image_bD), len(text_nD), image_b, text_n, label_smoothing)
        if image_BD is image_bD and text_ND is text_nD:  # one rank: each logit serves both directions
            pairs = Positives(owner_n, terms.image_positive_N + terms.text_positive_n, in_rows=True)
            loss = pair_softmax(
                text_nD, image_bD, scale, pairs, terms.text_n, terms.image_lse_b, text_n, image_b, chunk
            )
        else:
            of_images = Positives(row_N, terms.image_positive_N, in_rows=False)
            of_captions = Positives(owner_n, terms.text_positive_n, in_rows=True)
            loss = pair_softmax(
                image_bD, text_ND, scale, of_images, terms.image_lse_b, column_seen_M=text_N, chunk=chunk
            )
            loss = loss + pair_softmax(
                text_nD, image_BD, scale, of_captions, terms.text_n, column_seen_M=image_B, chunk=chunk
            )
        if label_smoothing:
            even = even_product(terms.image_b, image_bD, seen_sum(text_ND, text_N))
            even = even + even_product(terms.text_n, text_nD, seen_sum(image_BD, image_B))
            loss = loss - label_smoothing * scale.float().reshape(()) * even
        return loss / 2


class Terms(NamedTuple):
    """What each logit and log-sum-exp of one rank's queries counts in its loss."""

    image_b: torch.Tensor
    """Of an image in the mean over them."""
    image_lse_b: torch.Tensor
    """Of its log-sum-exp: 0 for an image without a caption, but for the smoothing."""
    image_positive_N: torch.Tensor
    """Of a caption's logit, as a positive of its image; 0 for images of other ranks."""
    text_n: torch.Tensor
    """Of a caption in the mean over them, and of its log-sum-exp."""
    text_positive_n: torch.Tensor
    """Of a caption's logit, with its image as the positive."""

    @classmethod
    def of(
        cls,
        row_N: torch.Tensor,
        images: int,
        captions: int,
        image_weight_b: torch.Tensor | None,
        text_weight_n: torch.Tensor | None,
        label_smoothing: float,
    ) -> Terms:
        """``row_N`` is each caption's row among this rank's images; outside of them where it is another's."""
        is_own_N = (row_N >= 0) & (row_N < images)
        row_N = row_N.clamp(0, images - 1)
        captions_b = torch.zeros(images, device=row_N.device).index_add_(0, row_N, is_own_N.float())
        share_N = is_own_N / captions_b.clamp(min=1)[row_N]
        image_b, text_n = _weight(image_weight_b, images, row_N), _weight(text_weight_n, captions, row_N)
        target = 1 - label_smoothing
        image_lse_b = image_b * (target * captions_b.clamp(max=1) + label_smoothing)
        return cls(image_b, image_lse_b, target * share_N * image_b[row_N], text_n, target * text_n)


def _weight(weight: torch.Tensor | None, queries: int, like: torch.Tensor) -> torch.Tensor:
    """[q] what a query's log-likelihood counts in the mean over all of them."""
    return torch.full((queries,), 1 / queries, device=like.device) if weight is None else weight.float() / queries


def seen_sum(candidate_cD: torch.Tensor, seen_c: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of the candidates that count, and after it their number, [D + 1]."""
    seen_c = torch.ones_like(candidate_cD[:, 0], dtype=torch.float32) if seen_c is None else seen_c.float()
    return torch.cat([seen_c @ candidate_cD.float(), seen_c.sum().reshape(1)])


def even_product(weight_q: torch.Tensor, query_qD: torch.Tensor, seen_E: torch.Tensor) -> torch.Tensor:
    """Return Σ weight · (mean product of the query with the candidates that count), of `seen_sum`'s [D + 1]."""
    return (weight_q @ query_qD.float()) @ (seen_E[:-1] / seen_E[-1].clamp(min=1))
