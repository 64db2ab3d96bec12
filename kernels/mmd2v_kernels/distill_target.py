"""The regression target of unimodal distillation: normalised, averaged layer results; and the loss against it.

Shapes: B sequences, T tokens, D width.
Source: data2vec 2.0 (Baevski et al. 2022), ``make_targets`` with ``instance_norm_target_layer``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mmd2v_kernels.dispatch import choose

__all__ = ["distill_loss", "distill_target"]


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
    Computed and returned in fp32 (fp64 of fp64). Deterministic. Raises ValueError when there is no layer result.
    """
    if _path(layer_results, None) == "triton":
        from mmd2v_kernels import distill_target_triton

        return distill_target_triton.distill_target(layer_results, mask_BT, final_layer_norm, eps)
    return _reference(layer_results, mask_BT, final_layer_norm, eps)


def distill_loss(
    layer_results: Sequence[torch.Tensor],
    prediction_BTD: torch.Tensor,
    *,
    mask_BT: torch.Tensor | None = None,
    final_layer_norm: bool,
    loss: str = "mse",
    beta: float = 1.0,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Return fp32 [B, T], the mean over D of the distance between ``prediction_BTD`` and `distill_target`.

    ``loss`` is ``"mse"`` or ``"smooth_l1"`` (a square below ``beta``); tokens that ``mask_BT`` leaves out have 0. The
    kernel writes no target. Deterministic. Raises ValueError for another loss or when there is no layer result.
    """
    if loss not in ("mse", "smooth_l1"):
        raise ValueError(f"loss: found '{loss}', expected 'mse' or 'smooth_l1'")
    if _path(layer_results, prediction_BTD) == "triton":
        from mmd2v_kernels import distill_target_triton

        return distill_target_triton.distill_loss(
            layer_results, prediction_BTD, mask_BT, final_layer_norm, loss, beta, eps
        )
    target_BTD = _reference(layer_results, mask_BT, final_layer_norm, eps)
    prediction_BTD = prediction_BTD.to(target_BTD.dtype)
    if loss == "mse":
        loss_BTD = F.mse_loss(prediction_BTD, target_BTD, reduction="none")
    else:
        loss_BTD = F.smooth_l1_loss(prediction_BTD, target_BTD, reduction="none", beta=beta)
    loss_BT = loss_BTD.mean(dim=-1)
    return loss_BT if mask_BT is None else loss_BT * mask_BT


def _path(layer_results: Sequence[torch.Tensor], prediction_BTD: torch.Tensor | None) -> str:
    if not layer_results:
        raise ValueError("layer_results: found none, expected at least one [B, T, D] tensor")
    first = layer_results[0]
    obstacle = None
    if torch.is_grad_enabled() and any(result_BTD.requires_grad for result_BTD in layer_results):
        obstacle = "the layer results need a gradient"
    elif any(result_BTD.dtype != first.dtype or result_BTD.shape != first.shape for result_BTD in layer_results):
        obstacle = "the layer results differ in dtype or shape"
    elif first.shape[-1] > 2048:
        obstacle = "a row is longer than 2048"
    elif prediction_BTD is not None and prediction_BTD.dtype == torch.float64:
        obstacle = "the kernels have no float64"
    obstacles = {} if obstacle is None else {"triton": obstacle}
    return choose("distill_target", first.device, first.dtype, rows=first.shape[:-1].numel(), obstacles=obstacles).path


def _reference(
    layer_results: Sequence[torch.Tensor], mask_BT: torch.Tensor | None, final_layer_norm: bool, eps: float
) -> torch.Tensor:
    dtype = torch.promote_types(layer_results[0].dtype, torch.float32)
    total_BTD = torch.zeros_like(layer_results[0], dtype=dtype)
    for result_BTD in layer_results:
        result_BTD = result_BTD.to(dtype)
        if mask_BT is None:
            variance, mean = torch.var_mean(result_BTD, dim=1, correction=0, keepdim=True)
        else:
            weight = mask_BT[..., None].to(dtype)
            count = weight.sum(dim=1, keepdim=True).clamp(min=1)
            mean = (result_BTD * weight).sum(dim=1, keepdim=True) / count
            variance = ((result_BTD - mean).square() * weight).sum(dim=1, keepdim=True) / count
        total_BTD = total_BTD + (result_BTD - mean) * torch.rsqrt(variance + eps)
    target_BTD = total_BTD / len(layer_results)
    return F.layer_norm(target_BTD, target_BTD.shape[-1:], eps=eps) if final_layer_norm else target_BTD
