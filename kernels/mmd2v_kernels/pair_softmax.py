"""What both directions of a contrastive loss ask of the logits of all pairs, which are never in memory at once.

The logits are taken in chunks of rows. A softmax over the rows of a column wants a first pass that finds its
normaliser; all else, the gradient with it, comes from one pass. The gradient is summed in the forward pass, as the
result is a scalar: the backward pass multiplies it.

Shapes: N rows, M columns, n rows of a chunk, D width, P positive pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mmd2v_kernels.logit_chunks import CHUNK, LogitChunks

__all__ = ["OUT_OF_SIGHT", "Positives", "pair_softmax"]

OUT_OF_SIGHT = -1e9  # a logit whose softmax is exactly 0 in fp32, and whose product with 0 is 0 (that of -inf is NaN)


class Positives(NamedTuple):
    """Pairs whose logits are subtracted, each times its weight."""

    row_P: torch.Tensor
    """int64; a pair whose row is none of the N adds nothing."""
    column_P: torch.Tensor
    weight_P: torch.Tensor


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
    """Return the scalar Σₙ wₙ log Σₘ exp lₙₘ + Σₘ wₘ log Σₙ exp lₙₘ − Σₚ wₚ lₚ of the logits l = scale · row · column.

    Without ``column_weight_M`` the second sum is left out. ``row_seen_N`` and ``column_seen_M`` are 1, or 0 for what no
    softmax sees. Differentiable with respect to rows, columns and ``scale`` (one element); weights are constants.
    Logits are computed in fp32, or fp64 where the embeddings are. Memory beyond the gradients: ``chunk`` logits, and as
    many exponentials.
    """
    dtype = torch.promote_types(row_ND.dtype, torch.float32)
    with torch.autocast(row_ND.device.type, enabled=False):  # which would round logits to bf16
        return _PairSoftmax.apply(
            row_ND.to(dtype),
            column_MD.to(dtype),
            scale.to(dtype).reshape(()),
            positives,
            row_weight_N.to(dtype),
            None if column_weight_M is None else column_weight_M.to(dtype),
            _offset(row_seen_N, dtype),
            _offset(column_seen_M, dtype),
            chunk,
        )


def _offset(seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if seen is None else OUT_OF_SIGHT * (1 - seen.to(dtype))


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
        chunks = LogitChunks(row_ND, column_MD, scale, chunk)
        needs_gradient = any(ctx.needs_input_grad[:3])
        total = row_ND.new_zeros(())
        column_lse_M = None
        if column_weight_M is not None:
            column_lse_M = _column_logsumexp(chunks, row_offset_N)
            total += column_weight_M @ column_lse_M
        row_gradient_ND = torch.empty_like(row_ND) if needs_gradient else row_ND
        column_gradient_MD = torch.zeros_like(column_MD) if needs_gradient else column_MD
        for rows in chunks.rows():
            logits_nM = chunks.logits(rows)
            place = _placed(positives, rows)
            total -= place.weight_P @ logits_nM[place.row_P, place.column_P]
            exponential_nM = _plus(logits_nM, column_offset_M, out=chunks.other(rows))
            largest_n1 = exponential_nM.amax(1, keepdim=True)
            sum_n1 = exponential_nM.sub_(largest_n1).exp_().sum(1, keepdim=True)
            weight_n = row_weight_N[rows]
            total += weight_n @ (largest_n1 + sum_n1.log())[:, 0]
            if not needs_gradient:
                continue
            gradient_nM = exponential_nM.mul_(weight_n[:, None] / sum_n1)
            if column_lse_M is not None:
                if row_offset_N is not None:
                    logits_nM += row_offset_N[rows, None]
                gradient_nM.addcmul_(logits_nM.sub_(column_lse_M).exp_(), column_weight_M.expand_as(logits_nM))
            gradient_nM.index_put_((place.row_P, place.column_P), -place.weight_P, accumulate=True)
            torch.mm(gradient_nM, column_MD, out=row_gradient_ND[rows])
            column_gradient_MD.addmm_(gradient_nM.t(), row_ND[rows])
        if needs_gradient:
            scale_gradient = torch.linalg.vecdot(row_gradient_ND, row_ND).sum()
            ctx.save_for_backward(row_gradient_ND.mul_(scale), column_gradient_MD.mul_(scale), scale_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None, None, None


def _column_logsumexp(chunks: LogitChunks, row_offset_N: torch.Tensor | None) -> torch.Tensor:
    """Return log Σₙ exp lₙₘ of each column, [M], chunk by chunk."""
    largest_M = sum_M = None
    for rows in chunks.rows():
        logits_nM = chunks.logits(rows)
        if row_offset_N is not None:
            logits_nM += row_offset_N[rows, None]
        new_M = logits_nM.amax(0)
        if largest_M is not None:
            new_M = torch.maximum(new_M, largest_M)
        added_M = logits_nM.sub_(new_M).exp_().sum(0)
        sum_M = added_M if sum_M is None else added_M + sum_M * (largest_M - new_M).exp_()
        largest_M = new_M
    return largest_M + sum_M.log()


def _plus(logits_nM: torch.Tensor, offset_M: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(logits_nM) if offset_M is None else torch.add(logits_nM, offset_M, out=out)


def _placed(positives: Positives, rows: slice) -> Positives:
    """Return all pairs with rows counted from the chunk's first; those of other rows weigh nothing.

    Choosing them would make the host wait for the device.
    """
    row_P = positives.row_P - rows.start
    inside_P = (row_P >= 0) & (row_P < rows.stop - rows.start)
    weight_P = torch.where(inside_P, positives.weight_P, 0)
    return Positives(row_P.clamp(0, rows.stop - rows.start - 1), positives.column_P, weight_P)
