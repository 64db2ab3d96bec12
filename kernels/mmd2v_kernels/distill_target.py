"""The regression target of unimodal distillation: normalised, averaged layer results.

Shapes: B sequences, T tokens, D width.
Source: data2vec 2.0 (Baevski et al. 2022), ``make_targets`` with ``instance_norm_target_layer``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["distill_target"]


def distill_target(
    layer_results: Sequence[torch.Tensor],
    *,
    mask_BT: torch.Tensor | None = None,
    final_layer_norm: bool,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Average the layer results ([B, T, D] each), every one normalised per channel over the tokens of its sample.

    ``mask_BT`` (bool, True = a real token) keeps padding out of the statistics; None counts every position.
    ``final_layer_norm`` adds a parameter-free LayerNorm over D (data2vec does so for images, not for text).
    Computed and returned in fp32. Raises ValueError when there is no layer result.
    """
    if not layer_results:
        raise ValueError("layer_results: found none, expected at least one [B, T, D] tensor")
    total_BTD = torch.zeros_like(layer_results[0], dtype=torch.float32)
    for result_BTD in layer_results:
        result_BTD = result_BTD.float()
        if mask_BT is None:
            variance, mean = torch.var_mean(result_BTD, dim=1, correction=0, keepdim=True)
        else:
            weight = mask_BT[..., None].float()
            count = weight.sum(dim=1, keepdim=True).clamp(min=1)
            mean = (result_BTD * weight).sum(dim=1, keepdim=True) / count
            variance = ((result_BTD - mean).square() * weight).sum(dim=1, keepdim=True) / count
        total_BTD = total_BTD + (result_BTD - mean) * torch.rsqrt(variance + eps)
    target_BTD = total_BTD / len(layer_results)
    return F.layer_norm(target_BTD, target_BTD.shape[-1:], eps=eps) if final_layer_norm else target_BTD
