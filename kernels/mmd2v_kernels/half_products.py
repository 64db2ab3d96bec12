"""Products of halves on a processor without instructions for them: computed in fp32, and only stored in halves.

torch's own there are up to 160 times slower than those of fp32.

Shapes: T rows, r of one block, D width, E output width.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["FP32_ROWS", "half_of", "linear", "multiplies", "product_dtype"]

_INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
FP32_ROWS = 512
"""Rows at a time, so that copies in fp32 exist of few: with 2,048 a small layer takes more memory than torch's own."""


@cache
def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Tell whether there are instructions for products of this precision."""
    if device != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _INSTRUCTIONS[dtype])())


def half_of(device: torch.device) -> torch.dtype | None:
    """Return the half precision that ``device`` has instructions for, bf16 before fp16; None of a processor without."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # oneDNN takes bf16 wherever there is AVX-512, and multiplies in fp32 where that is without bf16.
    native = platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and multiplies(device.type, torch.bfloat16) else None


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of ``x``'s matrix products, which autocast may lower."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def linear(x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """Return ``x weightᵀ + bias`` [T, E], in the dtype of `torch.nn.functional.linear` and under its autocast.

    Where that would multiply halves without instructions, products and sums are fp32 and the result is rounded once;
    for the backward pass no more is kept.
    """
    stored = product_dtype(x_TD)
    unequal = weight_ED.dtype != stored and not torch.is_autocast_enabled(x_TD.device.type)  # which torch refuses
    # A compiler is told the formula itself.
    told = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if multiplies(x_TD.device.type, stored) or unequal or told:
        return F.linear(x_TD, weight_ED, bias_E)
    return _Linear.apply(x_TD, weight_ED, bias_E, stored)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, stored: torch.dtype
    ) -> torch.Tensor:
        kept_TD = x_TD.to(stored)
        with torch.autocast(x_TD.device.type, enabled=False):
            w_ED, b_E = (parameter.to(stored).float() for parameter in (weight_ED, bias_E))
            out_TE = x_TD.new_empty(len(x_TD), len(weight_ED), dtype=stored)
            for x_rD, out_rE in zip(kept_TD.split(FP32_ROWS), out_TE.split(FP32_ROWS), strict=True):
                out_rE.copy_(torch.addmm(b_E, x_rD.float(), w_ED.t()))
        # The weight itself, not its copy: sharded parameters are gathered into it again.
        ctx.save_for_backward(kept_TD, weight_ED)
        ctx.dtypes = x_TD.dtype, bias_E.dtype, stored
        return out_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept_TD, weight_ED = ctx.saved_tensors
        of_x, of_bias, stored = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        with torch.autocast(dout_TE.device.type, enabled=False):
            w_ED = weight_ED.to(stored).float()
            dx_TD = torch.empty_like(kept_TD, dtype=of_x) if wants_x else None
            dw_ED = torch.zeros_like(w_ED) if wants_weight else None
            db_E = w_ED.new_zeros(len(w_ED)) if wants_bias else None
            for top in range(0, len(kept_TD), FP32_ROWS):
                rows = slice(top, top + FP32_ROWS)
                dout_rE = dout_TE[rows].float()
                if dx_TD is not None:
                    dx_TD[rows] = torch.mm(dout_rE, w_ED)
                if dw_ED is not None:
                    dw_ED.addmm_(dout_rE.t(), kept_TD[rows].float())
                if db_E is not None:
                    db_E += dout_rE.sum(0)
        return (
            dx_TD,
            None if dw_ED is None else dw_ED.to(weight_ED.dtype),
            None if db_E is None else db_E.to(of_bias),
            None,
        )
