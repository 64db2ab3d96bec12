"""A residual sum and the LayerNorm of it: what stands between two halves of a layer.

Shapes: T rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmd2v_kernels.dispatch import choose

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + branch`` [T, D] and its LayerNorm [T, D].

    Statistics are fp32, and of the sum before it is rounded to the dtype of ``x_TD``. Deterministic, gradients too.
    Raises ValueError for tensors that do not fit together.
    """
    if x_TD.ndim != 2 or x_TD.shape != branch_TD.shape or not weight_D.shape == bias_D.shape == x_TD.shape[1:]:
        raise ValueError(
            f"add_layer_norm: found rows {list(x_TD.shape)}, branch {list(branch_TD.shape)}, weight "
            f"{list(weight_D.shape)}, expected [T, D], [T, D], [D]"
        )
    obstacle = _obstacle(x_TD, branch_TD, weight_D, bias_D)
    obstacles = {} if obstacle is None else {"triton": obstacle}
    path = choose("add_layer_norm", x_TD.device, x_TD.dtype, rows=len(x_TD), obstacles=obstacles).path
    if path == "triton":
        from mmd2v_kernels import add_layer_norm_triton

        return add_layer_norm_triton.add_layer_norm(x_TD, branch_TD, weight_D, bias_D, eps)
    sum_TD = x_TD + branch_TD
    return sum_TD, F.layer_norm(sum_TD, sum_TD.shape[1:], weight_D, bias_D, eps)


def _obstacle(x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> str | None:
    """Say why the kernel cannot do this call; None: it can."""
    if not x_TD.dtype == branch_TD.dtype == weight_D.dtype == bias_D.dtype:
        return "rows and weights are of several dtypes"
    if x_TD.shape[1] > 8192:
        return "a row is longer than 8192"
    return None
