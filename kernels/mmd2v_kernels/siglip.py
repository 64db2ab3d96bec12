"""Sigmoid loss over all pairs of images and captions (Zhai et al. 2023), several captions an image allowed.

Shapes: b images of this rank, B images and N captions of all ranks, D width of the embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["siglip"]


def siglip(
    image_bD: torch.Tensor,
    text_ND: torch.Tensor,
    owner_N: torch.Tensor,
    image_offset: int,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean_over: float,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the scalar loss of this rank's images with all ranks' captions.

    ``image_bD`` are L2-normalised embeddings of this rank, ``text_ND`` those of all ranks (gathered with gradient; the
    same tensor on one rank): of the B × N pairs a rank holds its b × N. ``owner_N`` (int64) gives the row of each
    caption's image among the B, ``image_offset`` that of this rank's first. Every caption of an image is a positive of
    it, every other pair a negative. The sum over pairs is divided by ``mean_over``, the number of captions of a rank
    (in the source, which has one caption an image, the number of images): the mean over ranks is then the sum over
    all pairs divided by N. ``weights`` are those of the b images and the N captions, 0 for what is in no pair; the
    divisor stays, so that the loss is the same however the rows lie on ranks. Logits are computed in fp32, or fp64
    where the embeddings are.
    """
    dtype = torch.promote_types(image_bD.dtype, torch.float32)
    with torch.autocast(image_bD.device.type, enabled=False):  # which would round logits to bf16
        logits_bN = (scale.to(dtype) * image_bD.to(dtype)) @ text_ND.to(dtype).T + bias.to(dtype)
    rows_b = torch.arange(image_bD.shape[0], device=image_bD.device) + image_offset
    is_positive_bN = owner_N[None, :] == rows_b[:, None]
    # -log sigmoid(z) = softplus(-z); of a negative z is the logit with its sign changed.
    loss_bN = F.softplus(torch.where(is_positive_bN, -logits_bN, logits_bN))
    if weights is not None:
        image_b, text_N = weights
        loss_bN = loss_bN * image_b[:, None] * text_N
    return loss_bN.sum() / mean_over
