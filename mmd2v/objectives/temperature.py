"""A learned temperature that stays within bounds and can come back from outside them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

_LARGEST_LOG_SCALE = math.log(100)


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient dies outside the bounds only where a descent step would lead further out.

    With a plain clamp a temperature that once passed a bound would stay there for good.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,), (low, high), (gradient,) = ctx.saved_tensors, ctx.bounds, gradients
        outward = ((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None, None


def log_scales(temperature: float, learned: bool, count: int = 1) -> nn.Parameter:
    """Return ``count`` logarithms of the inverse temperature: a vector, because ZeRO-3 shards parameters by rows."""
    return nn.Parameter(torch.full((count,), -math.log(temperature)), requires_grad=learned)


def scales(log_scale: torch.Tensor) -> torch.Tensor:
    """Return the inverse temperatures, fp32, within [1, 100]."""
    return _ClampInward.apply(log_scale.float(), 0.0, _LARGEST_LOG_SCALE).exp()
