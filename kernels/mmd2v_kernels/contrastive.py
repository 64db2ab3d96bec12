"""Symmetric contrastive loss (InfoNCE) between images and captions, several captions an image allowed.

Shapes: b images and n captions of this rank, B and N of all ranks, D width of the embeddings.
Source: CLIP (Radford et al. 2021); with several captions an image, the image's term is the mean over its captions of
their negative log-likelihood, as in supervised contrastive learning (Khosla et al. 2020, "out" form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ContrastiveWeights", "contrastive"]

_OUT_OF_SIGHT = -1e9  # a logit whose softmax is exactly 0 in fp32, and whose product with 0 is 0 (that of -inf is NaN)


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
) -> torch.Tensor:
    """Return the scalar loss of this rank's rows: half the mean over its images plus half the mean over its captions.

    ``image_bD`` and ``text_nD`` are L2-normalised embeddings of this rank; ``image_BD`` and ``text_ND`` those of all
    ranks (gathered with gradient; the same tensors on one rank). ``owner_n`` and ``owner_N`` (int64) give each
    caption's row in ``image_BD``; ``image_offset`` is the row in ``image_BD`` of this rank's first image. ``scale``
    is the inverse temperature. ``weights`` leaves rows out: the means still divide by all rows, so that the loss is the
    same however the rows lie on ranks. Logits are computed in fp32.
    """
    image_b, text_n, image_B, text_N = weights or (None, None, None, None)
    # The cast keeps autocast from rounding logits to bf16: at scale 100 that would be half a unit of log-likelihood.
    with torch.autocast(image_bD.device.type, enabled=False):
        scale = scale.float()
        image_logits_bN = _logits(scale * image_bD.float(), text_ND.float(), text_N)
        text_logits_nB = _logits(scale * text_nD.float(), image_BD.float(), image_B)
    rows_b = torch.arange(image_bD.shape[0], device=image_bD.device) + image_offset
    positive_bN = (owner_N[None, :] == rows_b[:, None]).float()
    captions_b = positive_bN.sum(dim=1)
    image_mean_b = (positive_bN * image_logits_bN).sum(dim=1) / captions_b.clamp(min=1)
    text_mean_n = text_logits_nB.gather(1, owner_n[:, None])[:, 0]
    has_caption_b, has_image_n = captions_b.clamp(max=1), torch.ones_like(text_mean_n)
    image_loss = _cross_entropy(image_logits_bN, image_mean_b, has_caption_b, label_smoothing, image_b, text_N)
    text_loss = _cross_entropy(text_logits_nB, text_mean_n, has_image_n, label_smoothing, text_n, image_B)
    return (image_loss + text_loss) / 2


def _logits(query_qD: torch.Tensor, candidate_cD: torch.Tensor, counts_c: torch.Tensor | None) -> torch.Tensor:
    """[q, c] products, with candidates that do not count out of sight: one fused product and addition."""
    if counts_c is None:
        return query_qD @ candidate_cD.T
    return torch.addmm(_OUT_OF_SIGHT * (1 - counts_c), query_qD, candidate_cD.T)


def _cross_entropy(
    logits_qc: torch.Tensor,
    positive_q: torch.Tensor,
    mass_q: torch.Tensor,
    smoothing: float,
    query_q: torch.Tensor | None,
    candidate_c: torch.Tensor | None,
) -> torch.Tensor:
    """Mean cross-entropy over all q queries, of which those of weight 0 add nothing.

    ``positive_q`` is the mean logit of a query's positives and ``mass_q`` 1, or 0 for a query that has none;
    ``smoothing`` of the target's mass is spread evenly over the candidates that count.
    """
    expected_q = positive_q
    if smoothing:
        even_c = torch.ones_like(logits_qc[0]) if candidate_c is None else candidate_c
        even_q = (logits_qc * even_c).sum(dim=1) / even_c.sum().clamp(min=1)
        expected_q = (1 - smoothing) * positive_q + smoothing * even_q
        mass_q = (1 - smoothing) * mass_q + smoothing
    loss_q = mass_q * logits_qc.logsumexp(dim=1) - expected_q
    return (loss_q if query_q is None else loss_q * query_q).mean()
