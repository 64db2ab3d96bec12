"""What both directions of a contrastive loss ask of the logits of all pairs, which are never in memory at once.

The logits are taken in chunks of rows. A softmax over the rows of a column wants a first pass that finds its
normaliser; all else, the gradient with it, comes from one pass. The gradient is summed in the forward pass, as the
result is a scalar: the backward pass multiplies it.

Shapes: N rows, M columns, n rows of a chunk, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mmd2v_kernels.logit_chunks import CHUNK, LogitChunks, Positives, RunningLogSumExp, Softmax

__all__ = ["Positives", "out_of_sight", "pair_softmax", "part_of"]

_OUT_OF_SIGHT = -1e9  # a logit whose softmax is exactly 0 in fp32, and no difference of two is NaN


def pair_softmax(
    row_ND: torch.Tensor,
    column_MD: torch.Tensor,
    scale: torch.Tensor,
    positives: Positives,
    row_weight_N: torch.Tensor,
    column_weight_M: torch.Tensor | None = None,
    row_seen_N: torch.Tensor | None = None,
    column_seen_M: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the scalar Σₙ wₙ log Σₘ exp lₙₘ + Σₘ wₘ log Σₙ exp lₙₘ − Σ w l of the positives.

    l = scale · row · column are the logits. Without ``column_weight_M`` the second sum is left out. ``row_seen_N`` and
    ``column_seen_M`` are 1, or 0 for what no softmax sees. Differentiable with respect to rows, columns and ``scale``
    (one element); weights, at least 0, are constants. Logits are computed in fp32, or fp64 where the embeddings are.
    Memory beyond the gradients: ``chunk`` logits, and by torch as many exponentials.
    """
    dtype = torch.promote_types(row_ND.dtype, torch.float32)
    with torch.autocast(row_ND.device.type, enabled=False):  # which would round logits to bf16
        return _PairSoftmax.apply(
            row_ND.to(dtype),
            column_MD.to(dtype),
            scale.to(dtype).reshape(()),
            positives._replace(weight=positives.weight.to(dtype)),
            row_weight_N.to(dtype),
            None if column_weight_M is None else column_weight_M.to(dtype),
            out_of_sight(row_seen_N, dtype),
            out_of_sight(column_seen_M, dtype),
            chunk,
        )


def out_of_sight(seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what is added to logits of what is ``seen`` (1) or not (0): 0, or so little that its softmax is 0."""
    return None if seen is None else _OUT_OF_SIGHT * (1 - seen.to(dtype))


class _PairSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_ND: torch.Tensor,
        column_MD: torch.Tensor,
        scale: torch.Tensor,
        positives: Positives,
        row_weight_N: torch.Tensor,
        column_weight_M: torch.Tensor | None,
        row_offset_N: torch.Tensor | None,
        column_offset_M: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        chunks = LogitChunks("contrastive", len(row_ND), len(column_MD), row_ND, chunk)
        needs_gradient = any(ctx.needs_input_grad[:3])
        total = row_ND.new_zeros(())
        of_columns = None
        if column_weight_M is not None:
            of_columns = RunningLogSumExp.of_nothing(column_MD)
            for rows in chunks.rows():
                logits_nM = chunks.logits(row_ND[rows], column_MD, scale)
                chunks.fold(of_columns, logits_nM, part_of(row_offset_N, rows), dim=0)
            total += column_weight_M @ of_columns.value()
        row_gradient_ND = torch.empty_like(row_ND) if needs_gradient else row_ND
        column_gradient_MD = torch.zeros_like(column_MD) if needs_gradient else column_MD
        of_rows = RunningLogSumExp.of_nothing(row_ND)
        for rows in chunks.rows():
            logits_nM = chunks.logits(row_ND[rows], column_MD, scale)
            own = positives.of(rows)
            row, column, weight = own.places(logits_nM.shape)
            total -= weight @ logits_nM[row, column]
            of_own = of_rows.part(rows)
            if not needs_gradient:
                chunks.fold(of_own, logits_nM, column_offset_M, dim=1)
                continue
            columns = None
            if of_columns is not None and column_weight_M is not None:
                columns = Softmax.of(of_columns, column_weight_M, part_of(row_offset_N, rows))
            gradient_nM = chunks.whole_rows(of_own, logits_nM, row_weight_N[rows], column_offset_M, columns, own)
            torch.mm(gradient_nM, column_MD, out=row_gradient_ND[rows])
            column_gradient_MD.addmm_(gradient_nM.t(), row_ND[rows])
        total += row_weight_N @ of_rows.value()
        if needs_gradient:
            scale_gradient = torch.linalg.vecdot(row_gradient_ND, row_ND).sum()
            ctx.save_for_backward(row_gradient_ND.mul_(scale), column_gradient_MD.mul_(scale), scale_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None, None, None


def part_of(offset_N: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Return a chunk's, where there are any."""
    return None if offset_N is None else offset_N[rows]
