"""Symmetric contrastive loss (InfoNCE) between images and captions, several captions an image allowed.

Shapes: b images and n captions of this rank, B and N of all ranks, D width of the embeddings.
Source: CLIP (Radford et al. 2021); with several captions an image, the image's term is the mean over its captions of
their negative log-likelihood, as in supervised contrastive learning (Khosla et al. 2020, "out" form).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["contrastive"]


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
) -> torch.Tensor:
    """Return the scalar loss of this rank's rows: half the mean over its images plus half the mean over its captions.

    ``image_bD`` and ``text_nD`` are L2-normalised embeddings of this rank; ``image_BD`` and ``text_ND`` those of all
    ranks (gathered with gradient; the same tensors on one rank). ``owner_n`` and ``owner_N`` (int64) give each
    caption's row in ``image_BD``; ``image_offset`` is the row in ``image_BD`` of this rank's first image. ``scale``
    is the inverse temperature. Logits are computed in fp32.
    """
    # The cast keeps autocast from rounding logits to bf16: at scale 100 that would be half a unit of log-likelihood.
    with torch.autocast(image_bD.device.type, enabled=False):
        scale = scale.float()
        image_logits_bN = scale * image_bD.float() @ text_ND.float().T
        text_logits_nB = scale * text_nD.float() @ image_BD.float().T
    rows_b = torch.arange(image_bD.shape[0], device=image_bD.device) + image_offset
    positive_bN = (owner_N[None, :] == rows_b[:, None]).float()
    target_bN = positive_bN / positive_bN.sum(dim=1, keepdim=True).clamp(min=1)
    image_loss = F.cross_entropy(image_logits_bN, target_bN, label_smoothing=label_smoothing)
    text_loss = F.cross_entropy(text_logits_nB, owner_n, label_smoothing=label_smoothing)
    return (image_loss + text_loss) / 2
