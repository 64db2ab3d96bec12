"""Triton kernels of `expert_mlp` beside its matrix products: the norm, its backward, and the branch's gradient.

Shapes: T rows of ``x``, R rows that pass the experts, E experts, D width; P pieces (see `expert_mlp_pieces`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmd2v_kernels.expert_mlp_pieces import find_piece
from mmd2v_kernels.layer_norm_formulas import centre_rows, rows_gradient

__all__ = ["branch_gradient_kernel", "norm_backward_kernel", "norm_kernel"]


@triton.jit
def norm_kernel(
    x_ptr,  # [T, D]
    index_ptr,  # int64 [R]
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    weights_ptr,  # int64 [2, E] addresses: weights, then biases
    vector_ptr,  # [D] one of them, for its type
    normed_ptr,  # [R, D] out
    mean_ptr,  # fp32 [R] out
    rstd_ptr,  # fp32 [R] out
    width,  # D
    eps,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # D, up to a power of two
):
    """Gather rows and normalise them with their expert's weight and bias."""
    tile = tl.program_id(0)
    expert, first, end = find_piece(tile, stops_ptr, experts, ROWS)
    row = first + tl.arange(0, ROWS)
    is_row = row < end
    row = row.to(tl.int64)
    source = row
    if HAS_INDEX:
        source = tl.load(index_ptr + row, mask=is_row, other=0)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    inside = is_row[:, None] & is_column[None, :]
    x = tl.load(x_ptr + source[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    centred, mean, rstd = centre_rows(x, inside, width, eps)
    weight_ptr = tl.load(weights_ptr + expert).to(vector_ptr.dtype)
    bias_ptr = tl.load(weights_ptr + experts + expert).to(vector_ptr.dtype)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + row[:, None] * width + column[None, :], normed, mask=inside)
    tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)


@triton.jit
def branch_gradient_kernel(
    dout_ptr,  # [T, D]
    index_ptr,  # int64 [R]
    row_scale_ptr,  # [T]
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    scales_ptr,  # int64 [E] addresses of [D]
    vector_ptr,  # [D] one of them, for its type
    u_ptr,  # [R, D] out: the branch's gradient before the layer scale
    dt_ptr,  # [R, D] out: with it
    sums_ptr,  # fp32 [P, D] out: sums of a tile's columns of u
    width,  # D
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    KEEP: tl.constexpr,  # u is not simply dout
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gather a tile of the gradient and multiply it with the scales that the branch had."""
    blocks = tl.cdiv(width, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = find_piece(tile, stops_ptr, experts, ROWS)
    row = first + tl.arange(0, ROWS)
    is_row = row < end
    row = row.to(tl.int64)
    source = row
    if HAS_INDEX:
        source = tl.load(index_ptr + row, mask=is_row, other=0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    inside = is_row[:, None] & is_column[None, :]
    u = tl.load(dout_ptr + source[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_ROW_SCALE:
        u *= tl.load(row_scale_ptr + source, mask=is_row, other=0.0).to(tl.float32)[:, None]
    at = row[:, None] * width + column[None, :]
    if KEEP:
        tl.store(u_ptr + at, u, mask=inside)
    tl.store(sums_ptr + tile * width + column, tl.sum(u, axis=0), mask=is_column)
    if HAS_SCALE:
        scale_ptr = tl.load(scales_ptr + expert).to(vector_ptr.dtype)
        u *= tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        tl.store(dt_ptr + at, u, mask=inside)


@triton.jit
def norm_backward_kernel(
    dnormed_ptr,  # [R, D]
    x_ptr,  # [T, D]
    dout_ptr,  # [T, D] of the residual
    index_ptr,  # int64 [R]
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    weights_ptr,  # int64 [E] addresses of [D]
    vector_ptr,  # [D] one of them, for its type
    mean_ptr,  # fp32 [R]
    rstd_ptr,  # fp32 [R]
    dx_ptr,  # [T, D] out
    dweight_ptr,  # fp32 [P, D] out
    dbias_ptr,  # fp32 [P, D] out
    width,  # D
    HAS_INDEX: tl.constexpr,
    PIECE: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # at a time: a warp each, so that sums of a row stay within it
    BLOCK: tl.constexpr,
):
    """Add the norm's gradient to the residual's and scatter it; sum its weight's and bias's over a piece."""
    tile = tl.program_id(0)
    expert, first, end = find_piece(tile, stops_ptr, experts, PIECE)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    weight_ptr = tl.load(weights_ptr + expert).to(vector_ptr.dtype)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < end
        row = row.to(tl.int64)
        source = row
        if HAS_INDEX:
            source = tl.load(index_ptr + row, mask=is_row, other=0)
        inside = is_row[:, None] & is_column[None, :]
        there = source[:, None] * width + column[None, :]
        normed = tl.load(x_ptr + there, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)[:, None]
        normed = tl.where(inside, (normed - mean) * rstd, 0.0)
        here = row[:, None] * width + column[None, :]
        dnormed = tl.load(dnormed_ptr + here, mask=inside, other=0.0).to(tl.float32)
        dweight += dnormed * normed
        dbias += dnormed
        dnormed *= weight[None, :]
        dx = rows_gradient(dnormed, normed, rstd, width)
        dx += tl.load(dout_ptr + there, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + there, dx, mask=inside)
    tl.store(dweight_ptr + tile * width + column, tl.sum(dweight, axis=0), mask=is_column)
    tl.store(dbias_ptr + tile * width + column, tl.sum(dbias, axis=0), mask=is_column)
