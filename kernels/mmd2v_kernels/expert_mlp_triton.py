"""Triton kernels of `expert_mlp`: all experts in one launch a part; kept are the input, its norm and h.

The rows of all experts, in the order of the index, are cut into tiles that lie within one expert each. Parts: 1
LayerNorm and gather; 2 fc1, bias and GELU; 3 fc2, bias, scales, residual and scatter; 4 gather and scales backward,
then the gradient of h, with GELU computed again and fc1's bias gradient as partial sums; 5 weight gradients, each
expert's rows cut into chunks, so that there are more pieces of work than the tiles of a weight; 6 the gradient of the
norm's output; 7 the norm backward, residual and scatter.

Parts 2 to 6 are matrix products, each by the kernel of this file or by the library's on each expert's slice with one
kernel after it for what happens to the result, as `mmd2v_kernels.dispatch` says for that part.

GELU is exact to 2e-7 (Abramowitz and Stegun 7.1.26, here with the half of erfc that is asked for), which shares its
exponential with the derivative; in fp32 it is torch's.
Deterministic: no atomics, partial sums are added in one order.

Shapes: T rows of ``x``, R rows that pass the experts, E experts, D width, F hidden width; a matrix product has M rows
of a tile, N columns and depth K; P tiles or chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import NORM_ROWS, TRITON_NAMES, Configuration, norm_block
from mmd2v_kernels.dispatch import choose_part
from mmd2v_kernels.host_lists import on_device

if TYPE_CHECKING:
    from mmd2v_kernels.expert_mlp import Expert

__all__ = ["TILES", "Tiles", "configurations", "triton_expert_mlp"]

GELU, RESIDUAL, GELU_GRADIENT, PLAIN = 0, 1, 2, 3
"""What happens to a product before it is written."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces of work. On an H100 and in bf16 the fastest; ``step`` and ``flat`` were not measured yet."""

    rows: int = 128
    columns: int = 256
    gelu_columns: int = 128
    """Of parts 2 and 4, whose epilogue holds more."""
    depth: int = 64
    warps: int = 8
    stages: int = 4
    wgrad: tuple[int, int, int] = (128, 128, 32)
    """Rows and columns of a weight, and rows summed at a time."""
    wgrad_warps: int = 4
    chunk: int = 8192
    """Rows of a chunk of part 5, at most."""
    norm: int = 32
    """Rows of a program of part 7."""
    epilogue: tuple[int, int] = (64, 128)
    """Rows and columns of a program that follows the library's product."""
    epilogue_warps: int = 4
    step: int = 16
    """Rows at a time of a program that follows the library's product."""
    flat: int = 1024
    """Numbers of a program of GELU alone, after the library's product: its bias is the library's too."""


TILES = Tiles()


@triton.jit
def _piece(piece, stops_ptr, experts, SIZE: tl.constexpr):
    """Return the expert of a piece, its first row and its end: each expert's rows are cut into pieces of SIZE."""
    expert = 0
    first = 0
    end = 0
    begin = 0
    before = 0
    for e in range(0, experts):
        stop = tl.load(stops_ptr + e)
        count = tl.cdiv(stop - begin, SIZE)
        here = (piece >= before) & (piece < before + count)
        start = begin + (piece - before) * SIZE
        expert = tl.where(here, e, expert)
        first = tl.where(here, start, first)
        end = tl.where(here, tl.minimum(start + SIZE, stop), end)
        before += count
        begin = stop
    return expert, first, end


@triton.jit
def _gelu(h, EXACT: tl.constexpr):
    """Return GELU(h) and its derivative."""
    bell = tl.exp2(h * h * -0.7213475204444817)  # e^(−h² / 2)
    if EXACT:
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        # A division and tl.exp would each spend four instructions on ranges that do not occur here.
        root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(h))
        t = root * root
        series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        tail = series * bell  # of the normal distribution, beyond |h|: small without a cancellation
        below = tl.where(h < 0, tail, 1.0 - tail)
    return h * below, below + h * bell * 0.3989422804014327


@triton.jit
def _norm_kernel(
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
    tile = tl.program_id(0)
    expert, first, end = _piece(tile, stops_ptr, experts, ROWS)
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
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight_ptr = tl.load(weights_ptr + expert).to(vector_ptr.dtype)
    bias_ptr = tl.load(weights_ptr + experts + expert).to(vector_ptr.dtype)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + row[:, None] * width + column[None, :], normed, mask=inside)
    tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)


@triton.jit
def _branch_gradient_kernel(
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
    blocks = tl.cdiv(width, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = _piece(tile, stops_ptr, experts, ROWS)
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
def _write(
    product,  # fp32 [M, N], or a half of its columns or a step of its rows
    first,  # int64: the tile's first row
    row,  # int32 [M]: from there on, so that offsets within a tile are of 32 bits and cost half the registers
    is_row,  # bool [M]
    column,  # int32 [N]
    is_column,  # bool [N]
    expert,
    biases_ptr,  # this and what follows: see `_product_kernel`
    scales_ptr,  # int64 [E]
    vector_ptr,  # [N]
    h_ptr,  # [R, N]
    out_ptr,  # [R, N] or [T, N]
    x_ptr,  # [T, N] or [R, N]
    index_ptr,  # int64 [R]
    row_scale_ptr,  # [T]
    columns,  # N
    EPILOGUE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write a tile and return what was written."""
    inside = is_row[:, None] & is_column[None, :]
    at = row[:, None] * columns + column[None, :]
    base = first * columns
    if HAS_BIAS:
        bias_ptr = tl.load(biases_ptr + expert).to(vector_ptr.dtype)
        product += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 0:
        if KEEP:
            tl.store(h_ptr + base + at, product, mask=inside)
            product = product.to(h_ptr.dtype.element_ty).to(tl.float32)
        product, _ = _gelu(product, EXACT)
        tl.store(out_ptr + base + at, product, mask=inside)
    elif EPILOGUE == 1:
        if HAS_SCALE:
            scale_ptr = tl.load(scales_ptr + expert).to(vector_ptr.dtype)
            product *= tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        target = first + row
        if HAS_INDEX:
            target = tl.load(index_ptr + first + row, mask=is_row, other=0)
            at = target[:, None] * columns + column[None, :]
            base = base * 0
        if HAS_ROW_SCALE:
            product *= tl.load(row_scale_ptr + target, mask=is_row, other=0.0).to(tl.float32)[:, None]
        product += tl.load(x_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + base + at, product, mask=inside)
    elif EPILOGUE == 2:
        h = tl.load(h_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        g, slope = _gelu(h, EXACT)
        # g takes the place that x has in the residual epilogue: it is an output here.
        tl.store(x_ptr + base + at, g, mask=inside)
        product *= slope  # 0 beyond the rows, as what was multiplied is
        tl.store(out_ptr + base + at, product, mask=inside)
    else:
        tl.store(out_ptr + base + at, product, mask=inside)
    return product


@triton.jit
def _product_kernel(
    a_ptr,  # [R, K]
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    weights_ptr,  # int64 [E] addresses of [N, K], or of [K, N] if transposed
    biases_ptr,  # int64 [E] addresses of [N]
    scales_ptr,  # int64 [E] addresses of [N]
    vector_ptr,  # [N] one of those, for its type
    h_ptr,  # [R, N] out of GELU, in of its gradient
    out_ptr,  # [R, N] out; of the residual [T, N]
    x_ptr,  # [T, N] in of the residual; [R, N] out of GELU's gradient: GELU(h)
    index_ptr,  # int64 [R]
    row_scale_ptr,  # [T]
    sums_ptr,  # fp32 [P, N] out: sums of a tile's columns
    columns,  # N
    depth,  # K
    TRANSPOSED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,  # N and K are multiples of the tile's
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = _piece(tile, stops_ptr, experts, ROWS)
    row = tl.arange(0, ROWS)
    is_row = row < end - first
    first = first.to(tl.int64)
    a_ptr += first * depth
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    weight_ptr = tl.load(weights_ptr + expert).to(a_ptr.dtype)
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        is_a, is_w = is_row[:, None], is_column[None, :]
        if not WHOLE:
            is_a, is_w = is_a & (k < depth)[None, :], is_w & (k < depth)[:, None]
        a = tl.load(a_ptr + row[:, None] * depth + k[None, :], mask=is_a, other=0.0)
        if TRANSPOSED:  # noqa: SIM108
            at = k[:, None] * columns + column[None, :]
        else:
            at = column[None, :] * depth + k[:, None]
        if WHOLE:  # noqa: SIM108
            w = tl.load(tl.multiple_of(weight_ptr, 16) + at)
        else:
            w = tl.load(weight_ptr + at, mask=is_w, other=0.0)
        product = tl.dot(a, w, product, input_precision=PRECISION)
    # By halves: the whole tile and what the epilogue reads would not fit the registers.
    halves = tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    half = block * COLUMNS + tl.arange(0, COLUMNS // 2)
    written = _write(
        left, first, row, is_row, half, half < columns, expert, biases_ptr, scales_ptr, vector_ptr, h_ptr, out_ptr,
        x_ptr, index_ptr, row_scale_ptr, columns, EPILOGUE, HAS_INDEX, HAS_SCALE, HAS_ROW_SCALE, HAS_BIAS, KEEP, EXACT,
    )  # fmt: skip
    if EPILOGUE == 2:
        tl.store(sums_ptr + tile * columns + half, tl.sum(written, axis=0), mask=half < columns)
    half += COLUMNS // 2
    written = _write(
        right, first, row, is_row, half, half < columns, expert, biases_ptr, scales_ptr, vector_ptr, h_ptr, out_ptr,
        x_ptr, index_ptr, row_scale_ptr, columns, EPILOGUE, HAS_INDEX, HAS_SCALE, HAS_ROW_SCALE, HAS_BIAS, KEEP, EXACT,
    )  # fmt: skip
    if EPILOGUE == 2:
        tl.store(sums_ptr + tile * columns + half, tl.sum(written, axis=0), mask=half < columns)


@triton.jit
def _epilogue_kernel(
    raw_ptr,  # [R, N] the product; may be the memory of an output
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    biases_ptr,  # this and what follows: see `_product_kernel`
    scales_ptr,
    vector_ptr,
    h_ptr,
    out_ptr,
    x_ptr,
    index_ptr,
    row_scale_ptr,
    sums_ptr,
    columns,  # N
    EPILOGUE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,  # rows at a time: with all of a tile the registers would hold few programs
    COLUMNS: tl.constexpr,
):
    # Programs that run together share rows: their columns lie beside one another in memory.
    blocks = tl.cdiv(columns, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = _piece(tile, stops_ptr, experts, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    total = tl.zeros([STEP, COLUMNS], dtype=tl.float32)
    for start in range(0, ROWS, STEP):
        row = start + tl.arange(0, STEP)
        is_row = row < end - first
        at = first.to(tl.int64) * columns + row[:, None] * columns + column[None, :]
        product = tl.load(raw_ptr + at, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        total += _write(
            product, first.to(tl.int64), row, is_row, column, is_column, expert, biases_ptr, scales_ptr, vector_ptr,
            h_ptr, out_ptr, x_ptr, index_ptr, row_scale_ptr, columns, EPILOGUE, HAS_INDEX, HAS_SCALE, HAS_ROW_SCALE,
            HAS_BIAS, KEEP, EXACT,
        )  # fmt: skip
    if EPILOGUE == 2:
        tl.store(sums_ptr + tile * columns + column, tl.sum(total, axis=0), mask=is_column)


@triton.jit
def _gelu_kernel(
    h_ptr,  # [R, F], of any number of experts: the library has added the bias
    out_ptr,  # [R, F] out; may be the same memory
    size,  # R · F
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    g, _ = _gelu(h, EXACT)
    tl.store(out_ptr + at, g, mask=at < size)


@triton.jit
def _weight_gradient_kernel(
    left_ptr,  # [R, M] gradient of the product
    right_ptr,  # [R, N] what was multiplied
    stops_ptr,  # int32 [E]
    experts,  # E
    partial_ptr,  # fp32 [P, M, N] out
    height,  # M
    columns,  # N
    WHOLE: tl.constexpr,  # M and N are multiples of the tile's
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a piece
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    chunk = tl.program_id(1)
    _, row, end = _piece(chunk, stops_ptr, experts, CHUNK)
    m = tl.program_id(0) // blocks * HEIGHT + tl.arange(0, HEIGHT)
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([HEIGHT, COLUMNS], dtype=tl.float32)
    for start in range(row, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        is_left, is_right = (k < end)[None, :], (k < end)[:, None]
        if not WHOLE:
            is_left, is_right = is_left & (m < height)[:, None], is_right & (n < columns)[None, :]
        k = k.to(tl.int64)
        left = tl.load(left_ptr + k[None, :] * height + m[:, None], mask=is_left, other=0.0)
        right = tl.load(right_ptr + k[:, None] * columns + n[None, :], mask=is_right, other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    at = (chunk.to(tl.int64) * height + m[:, None]) * columns + n[None, :]
    tl.store(partial_ptr + at, product, mask=(m < height)[:, None] & (n < columns)[None, :])


@triton.jit
def _norm_backward_kernel(
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
    tile = tl.program_id(0)
    expert, first, end = _piece(tile, stops_ptr, experts, PIECE)
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
        mean_d = tl.sum(dnormed, axis=1) / width
        mean_dn = tl.sum(dnormed * normed, axis=1) / width
        dx = (dnormed - mean_d[:, None] - normed * mean_dn[:, None]) * rstd
        dx += tl.load(dout_ptr + there, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + there, dx, mask=inside)
    tl.store(dweight_ptr + tile * width + column, tl.sum(dweight, axis=0), mask=is_column)
    tl.store(dbias_ptr + tile * width + column, tl.sum(dbias, axis=0), mask=is_column)


def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return on_device([t.data_ptr() for t in tensors], torch.int64, tensors[0].device)


def _pieces(rows: Sequence[tuple[int, int]], size: int) -> list[int]:
    """Return into how many pieces of at most ``size`` rows each expert's are cut (see `_piece`)."""
    return [triton.cdiv(stop - start, size) for start, stop in rows]


def _stops(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return on_device([stop for _, stop in rows], torch.int32, device)


def _precision(dtype: torch.dtype) -> str:
    # TF32, the default for fp32, keeps 10 bits.
    return "ieee" if dtype == torch.float32 else "tf32"


_PARTS = {GELU: "fc1", RESIDUAL: "fc2", GELU_GRADIENT: "dgrad2", PLAIN: "dgrad1"}
"""Epilogue → the part that ends with it, as `mmd2v_kernels.measured` names it."""


def _product(
    epilogue: int,
    a_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    rows: Sequence[tuple[int, int]],
    out: torch.Tensor,
    tiles: Tiles,
    *,
    transposed: bool = False,
    biases: Sequence[torch.Tensor] = (),
    scales: Sequence[torch.Tensor] = (),
    h_RN: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
    row_scale_T: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Multiply each expert's rows with its weight; return each one's sums of columns, fp32 [N] (or nothing)."""
    device, depth = a_RK.device, a_RK.shape[1]
    columns = weights[0].shape[1] if transposed else weights[0].shape[0]
    by_library = choose_part("expert_mlp", _PARTS[epilogue], device, a_RK.dtype, rows=len(a_RK)) == "segmented"
    has_bias, keep = bool(biases), h_RN is not None
    raw = None
    if by_library:
        # Into the memory of a result where one has its shape: each program reads its piece before it writes it.
        if epilogue == RESIDUAL:
            raw = torch.empty(len(a_RK), columns, dtype=a_RK.dtype, device=device)
        else:
            raw = h_RN if epilogue == GELU and h_RN is not None else out
        for i, (start, stop) in enumerate(rows):
            if start == stop:
                continue
            weight = weights[i] if transposed else weights[i].t()
            if epilogue == GELU:  # the library adds the bias at no cost, and h is written but once
                torch.addmm(biases[i].to(a_RK.dtype), a_RK[start:stop], weight, out=raw[start:stop])
            else:
                torch.mm(a_RK[start:stop], weight, out=raw[start:stop])
        if epilogue == PLAIN:
            return []
        if epilogue == GELU:
            _gelu_kernel[(triton.cdiv(raw.numel(), tiles.flat),)](
                raw,
                out,
                raw.numel(),
                EXACT=a_RK.dtype == torch.float32,
                BLOCK=tiles.flat,
                num_warps=tiles.epilogue_warps,
            )
            return []
        height, wide = tiles.epilogue
    else:
        height, wide = tiles.rows, tiles.gelu_columns if epilogue in (GELU, GELU_GRADIENT) else tiles.columns
    pieces = _pieces(rows, height)
    count = sum(pieces)
    sums_PN = torch.empty(count if epilogue == GELU_GRADIENT else 0, columns, dtype=torch.float32, device=device)
    vectors = [*biases, *scales] or [a_RK]
    nothing = a_RK
    where = (
        _addresses(biases) if biases else nothing,
        _addresses(scales) if scales else nothing,
        vectors[0],
        nothing if h_RN is None else h_RN,
        out,
        nothing if x is None else x,
        nothing if index_R is None else index_R,
        nothing if row_scale_T is None else row_scale_T,
        sums_PN if epilogue == GELU_GRADIENT else nothing,
        columns,
    )
    how = {
        "EPILOGUE": epilogue,
        "HAS_INDEX": index_R is not None,
        "HAS_SCALE": bool(scales),
        "HAS_ROW_SCALE": row_scale_T is not None,
        "HAS_BIAS": has_bias,
        "KEEP": keep,
        "EXACT": a_RK.dtype == torch.float32,
        "ROWS": height,
        "COLUMNS": wide,
    }
    stops_E = _stops(rows, device)
    if raw is not None:
        _epilogue_kernel[(count * triton.cdiv(columns, wide),)](
            raw, stops_E, len(rows), *where, **how, STEP=min(height, tiles.step), num_warps=tiles.epilogue_warps
        )
    else:
        _product_kernel[(count * triton.cdiv(columns, wide),)](
            a_RK,
            stops_E,
            len(rows),
            _addresses(weights),
            *where,
            depth,
            **how,
            TRANSPOSED=transposed,
            WHOLE=columns % wide == 0 and depth % tiles.depth == 0,
            PRECISION=_precision(a_RK.dtype),
            DEPTH=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return _per_expert(sums_PN, pieces) if epilogue == GELU_GRADIENT else []


def _per_expert(partial_PX: torch.Tensor, pieces: list[int]) -> list[torch.Tensor]:
    """Add up the partial sums of each expert's pieces; 0 where it has none."""
    return [part.sum(dim=0) for part in partial_PX.split(pieces)]


def _weight_gradient(
    left_RM: torch.Tensor, right_RN: torch.Tensor, rows: Sequence[tuple[int, int]], tiles: Tiles
) -> list[torch.Tensor]:
    """Return leftᵀ right of each expert's rows, fp32 [M, N]."""
    height, columns = left_RM.shape[1], right_RN.shape[1]
    if choose_part("expert_mlp", "wgrad", left_RM.device, left_RM.dtype, rows=len(left_RM)) == "segmented":
        return [_product_in_fp32(left_RM[start:stop].t(), right_RN[start:stop]) for start, stop in rows]
    pieces = _pieces(rows, tiles.chunk)
    partial = torch.empty(sum(pieces), height, columns, dtype=torch.float32, device=left_RM.device)
    m, n, depth = tiles.wgrad
    _weight_gradient_kernel[(triton.cdiv(height, m) * triton.cdiv(columns, n), sum(pieces))](
        left_RM,
        right_RN,
        _stops(rows, left_RM.device),
        len(rows),
        partial,
        height,
        columns,
        WHOLE=height % m == 0 and columns % n == 0,
        PRECISION=_precision(left_RM.dtype),
        CHUNK=tiles.chunk,
        HEIGHT=m,
        COLUMNS=n,
        DEPTH=depth,
        num_warps=tiles.wgrad_warps,
        num_stages=tiles.stages,
    )
    return _per_expert(partial, pieces)


def _product_in_fp32(left_MR: torch.Tensor, right_RN: torch.Tensor) -> torch.Tensor:
    """Return the product, fp32 [M, N], without rounding it on the way."""
    if left_MR.dtype == torch.float32:
        return left_MR @ right_RN
    if left_MR.device.type == "cuda":
        return torch.mm(left_MR, right_RN, out_dtype=torch.float32)
    return left_MR.float() @ right_RN.float()


def _experts(flat: Sequence[torch.Tensor], scaled: bool) -> list[list[torch.Tensor]]:
    count = 7 if scaled else 6
    return [list(flat[i : i + count]) for i in range(0, len(flat), count)]


@torch.library.custom_op("mmd2v::expert_mlp", mutates_args=())
def _forward(
    x_TD: torch.Tensor,
    index_R: torch.Tensor | None,
    row_scale_T: torch.Tensor | None,
    flat: Sequence[torch.Tensor],
    stops: Sequence[int],
    scaled: bool,
    eps: float,
    products: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows [T, D] and, empty unless ``keep``, their norm [R, D], h [R, F], mean and rstd [R]."""
    experts, rows, tiles = _experts(flat, scaled), _ranges(stops), TILES
    total, (hidden, width), device = stops[-1], experts[0][2].shape, x_TD.device
    wide = torch.promote_types(x_TD.dtype, experts[0][5].dtype)
    out_TD = torch.empty(x_TD.shape, dtype=wide, device=device) if index_R is None else x_TD.to(wide, copy=True)
    kept = total if keep else 0
    if total == 0:
        return out_TD, *_new_saved(x_TD, 0, hidden, products)
    x_TD = x_TD.contiguous()
    normed_RD, h_RF, mean_R, rstd_R = _new_saved(x_TD, total, hidden, products, h_rows=kept)
    block, warps = norm_block(width)
    _norm_kernel[(sum(_pieces(rows, NORM_ROWS)),)](
        x_TD,
        x_TD if index_R is None else index_R,
        _stops(rows, device),
        len(experts),
        _addresses([e[0] for e in experts] + [e[1] for e in experts]),
        experts[0][0],
        normed_RD,
        mean_R,
        rstd_R,
        width,
        eps,
        HAS_INDEX=index_R is not None,
        ROWS=NORM_ROWS,
        BLOCK=block,
        num_warps=warps,
    )
    g_RF = torch.empty(total, hidden, dtype=products, device=device)
    fc1, fc2 = ([e[place].to(products).contiguous() for e in experts] for place in (2, 4))
    _product(GELU, normed_RD, fc1, rows, g_RF, tiles, biases=[e[3] for e in experts], h_RN=h_RF if keep else None)
    _product(
        RESIDUAL,
        g_RF,
        fc2,
        rows,
        out_TD,
        tiles,
        biases=[e[5] for e in experts],
        scales=[e[6] for e in experts] if scaled else (),
        x=x_TD,
        index_R=index_R,
        row_scale_T=row_scale_T,
    )
    return out_TD, normed_RD[:kept], h_RF, mean_R[:kept], rstd_R[:kept]


def _new_saved(
    x_TD: torch.Tensor, total: int, hidden: int, products: torch.dtype, h_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return memory for the norm [R, D], h [R, F], mean and rstd [R]."""

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x_TD.device)

    normed_RD = new(total, x_TD.shape[1], dtype=products)
    h_RF = new(total if h_rows is None else h_rows, hidden, dtype=products)
    return normed_RD, h_RF, new(total, dtype=torch.float32), new(total, dtype=torch.float32)


@_forward.register_fake
def _(x_TD, index_R, row_scale_T, flat, stops, scaled, eps, products, keep):
    wide = torch.promote_types(x_TD.dtype, flat[5].dtype)
    out_TD = torch.empty(x_TD.shape, dtype=wide, device=x_TD.device)
    return out_TD, *_new_saved(x_TD, stops[-1] if keep else 0, flat[2].shape[0], products)


def _ranges(stops: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *stops[:-1]], stops, strict=True))


@torch.library.custom_op("mmd2v::expert_mlp_backward", mutates_args=())
def _backward(
    dout_TD: torch.Tensor,
    x_TD: torch.Tensor,
    index_R: torch.Tensor | None,
    row_scale_T: torch.Tensor | None,
    flat: Sequence[torch.Tensor],
    stops: Sequence[int],
    scaled: bool,
    normed_RD: torch.Tensor,
    h_RF: torch.Tensor,
    mean_R: torch.Tensor,
    rstd_R: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the gradient of ``x`` and those of ``flat``."""
    experts, rows, tiles = _experts(flat, scaled), _ranges(stops), TILES
    total, width, products, device = stops[-1], x_TD.shape[1], h_RF.dtype, x_TD.device
    dx_TD = torch.empty_like(x_TD) if index_R is None else dout_TD.to(x_TD.dtype, copy=True)
    if total == 0:
        return [dx_TD, *(torch.zeros_like(t) for t in flat)]
    x_TD, dout_TD = x_TD.contiguous(), dout_TD.contiguous()
    u_RD, dt_RD, sum_u = _branch_gradient(dout_TD, index_R, row_scale_T, experts, rows, scaled, products, tiles)
    fc1, fc2 = ([e[place].to(products).contiguous() for e in experts] for place in (2, 4))
    g_RF, dh_RF = torch.empty_like(h_RF), torch.empty_like(h_RF)
    db1 = _product(GELU_GRADIENT, dt_RD, fc2, rows, dh_RF, tiles, transposed=True, h_RN=h_RF, x=g_RF)
    dw2 = _weight_gradient(u_RD, g_RF, rows, tiles)
    del g_RF, u_RD
    dw1 = _weight_gradient(dh_RF, normed_RD, rows, tiles)
    dnormed_RD = dt_RD if dt_RD is not dout_TD else torch.empty_like(dt_RD)  # its memory is not needed any more
    _product(PLAIN, dh_RF, fc1, rows, dnormed_RD, tiles, transposed=True)
    pieces, (block, warps) = _pieces(rows, tiles.norm), norm_block(width)
    partial_2PD = torch.empty(2, sum(pieces), width, dtype=torch.float32, device=device)
    _norm_backward_kernel[(sum(pieces),)](
        dnormed_RD,
        x_TD,
        dout_TD,
        x_TD if index_R is None else index_R,
        _stops(rows, device),
        len(experts),
        _addresses([e[0] for e in experts]),
        experts[0][0],
        mean_R,
        rstd_R,
        dx_TD,
        partial_2PD[0],
        partial_2PD[1],
        width,
        HAS_INDEX=index_R is not None,
        PIECE=tiles.norm,
        ROWS=NORM_ROWS,
        BLOCK=block,
        num_warps=warps,
    )
    dnorm_weight, dnorm_bias = (_per_expert(p, pieces) for p in partial_2PD)
    found = [dx_TD]
    for i, e in enumerate(experts):
        gradients = [dnorm_weight[i], dnorm_bias[i], dw1[i], db1[i], dw2[i], sum_u[i]]
        if scaled:
            # fc2's output is not kept: its product with u is read off the weight's gradient.
            gradients.append(torch.linalg.vecdot(dw2[i], e[4].to(dw2[i].dtype)).addcmul_(sum_u[i], e[5]))
            gradients[4:6] = dw2[i].mul_(e[6][:, None]), sum_u[i] * e[6]
        found += [gradient.to(t.dtype) for gradient, t in zip(gradients, e, strict=True)]
    return found


@_backward.register_fake
def _(dout_TD, x_TD, index_R, row_scale_T, flat, stops, scaled, normed_RD, h_RF, mean_R, rstd_R):
    return [torch.empty_like(x_TD), *(torch.empty_like(t) for t in flat)]


def _branch_gradient(
    dout_TD: torch.Tensor,
    index_R: torch.Tensor | None,
    row_scale_T: torch.Tensor | None,
    experts: list[list[torch.Tensor]],
    rows: Sequence[tuple[int, int]],
    scaled: bool,
    products: torch.dtype,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the gradient of the branch without and with its layer scale, [R, D], and its sums of columns, fp32 [D]."""
    shape, device = (rows[-1][1], dout_TD.shape[1]), dout_TD.device
    own = index_R is not None or row_scale_T is not None or dout_TD.dtype != products
    u_RD = torch.empty(shape, dtype=products, device=device) if own else dout_TD
    dt_RD = torch.empty(shape, dtype=products, device=device) if scaled else u_RD
    height, wide = tiles.epilogue
    pieces = _pieces(rows, height)
    sums_PD = torch.empty(sum(pieces), shape[1], dtype=torch.float32, device=device)
    _branch_gradient_kernel[(sum(pieces) * triton.cdiv(shape[1], wide),)](
        dout_TD,
        dout_TD if index_R is None else index_R,
        dout_TD if row_scale_T is None else row_scale_T,
        _stops(rows, device),
        len(experts),
        _addresses([e[6] for e in experts]) if scaled else dout_TD,
        experts[0][-1],
        u_RD,
        dt_RD,
        sums_PD,
        shape[1],
        HAS_INDEX=index_R is not None,
        HAS_SCALE=scaled,
        HAS_ROW_SCALE=row_scale_T is not None,
        KEEP=own,
        ROWS=height,
        COLUMNS=wide,
        num_warps=tiles.epilogue_warps,
    )
    return u_RD, dt_RD, _per_expert(sums_PD, pieces)


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_TD, index_R, row_scale_T, flat, stops, scaled, _, _, _ = inputs
    ctx.call = (stops, scaled)
    ctx.save_for_backward(x_TD, index_R, row_scale_T, *output[1:], *flat)


def _differentiate(ctx: Any, dout_TD: torch.Tensor, *_: torch.Tensor) -> tuple:
    x_TD, index_R, row_scale_T, normed_RD, h_RF, mean_R, rstd_R, *flat = ctx.saved_tensors
    dx_TD, *dflat = _backward(dout_TD, x_TD, index_R, row_scale_T, flat, *ctx.call, normed_RD, h_RF, mean_R, rstd_R)
    return dx_TD, None, None, dflat, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def triton_expert_mlp(
    x_TD: torch.Tensor,
    experts: Sequence[Expert],
    rows: Sequence[tuple[int, int]],
    *,
    row_scale_T: torch.Tensor | None,
    index_R: torch.Tensor | None,
    products: torch.dtype,
) -> torch.Tensor:
    """Do what `expert_mlp` says with ``norm="pre"``, without dropout, inner norm and branch.

    ``products`` is the dtype of the operands of matrix products.
    """
    scaled = experts[0].layer_scale is not None
    flat = [t.contiguous() for expert in experts for t in expert[: 7 if scaled else 6]]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, *flat))
    stops = [stop for _, stop in rows]
    if row_scale_T is not None:
        row_scale_T = row_scale_T.contiguous()
    return _forward(x_TD, index_R, row_scale_T, flat, stops, scaled, experts[0].eps, products, keep)[0]


def configurations() -> list[Configuration]:
    """Return the forms for bf16, width 768 and hidden width 3072."""
    rows, tiles = f"*{TRITON_NAMES['bfloat16']}", TILES
    found = []
    arguments = {
        "a_ptr": rows,
        "stops_ptr": "*i32",
        "experts": "i32",
        "weights_ptr": "*i64",
        "biases_ptr": "*i64",
        "scales_ptr": "*i64",
    }
    arguments |= dict.fromkeys(["vector_ptr", "h_ptr", "out_ptr", "x_ptr"], rows)
    arguments |= {"index_ptr": "*i64", "row_scale_ptr": rows, "sums_ptr": "*fp32", "columns": "i32", "depth": "i32"}
    flags = ["TRANSPOSED", "EPILOGUE", "HAS_INDEX", "HAS_SCALE", "HAS_ROW_SCALE", "HAS_BIAS", "KEEP", "EXACT", "WHOLE"]
    flags.append("PRECISION")
    arguments |= dict.fromkeys([*flags, "ROWS", "COLUMNS", "DEPTH"], "constexpr")
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
    for name, values in {
        "fc1": (False, GELU, False, False, False, True, True, False, True, "tf32"),
        "fc2": (False, RESIDUAL, True, True, True, True, False, False, True, "tf32"),
        "dgrad2": (True, GELU_GRADIENT, False, False, False, False, True, False, True, "tf32"),
        "dgrad1": (True, PLAIN, False, False, False, False, False, False, True, "tf32"),
    }.items():
        constants = dict(zip(flags, values, strict=True)) | sizes
        if name in ("fc1", "dgrad2"):
            constants["COLUMNS"] = tiles.gelu_columns
        found.append(
            Configuration(
                f"expert_mlp/{name}",
                _product_kernel,
                arguments,
                constants,
                tiles.warps,
                tiles.stages,
                tensor_cores=True,
                aligned=("columns", "depth"),
            )
        )
    after = {"raw_ptr": rows, "stops_ptr": "*i32", "experts": "i32"}
    after |= {n: kind for n, kind in arguments.items() if n.endswith("_ptr")} | {"columns": "i32"}
    for name in ("a_ptr", "weights_ptr"):
        del after[name]
    unused = ("TRANSPOSED", "WHOLE", "PRECISION", "DEPTH")
    after |= {n: kind for n, kind in arguments.items() if kind == "constexpr" and n not in unused}
    after["STEP"] = "constexpr"
    for one in found[1:3]:
        constants = {n: value for n, value in one.constants.items() if n not in unused}
        constants |= dict(zip(("ROWS", "COLUMNS"), tiles.epilogue, strict=True)) | {"STEP": tiles.step}
        name = f"{one.name}_epilogue"
        found.append(
            Configuration(name, _epilogue_kernel, after, constants, tiles.epilogue_warps, aligned=("columns",))
        )
    flat = {"h_ptr": rows, "out_ptr": rows, "size": "i64", "EXACT": "constexpr", "BLOCK": "constexpr"}
    constants = {"EXACT": False, "BLOCK": tiles.flat}
    found.append(
        Configuration("expert_mlp/gelu", _gelu_kernel, flat, constants, tiles.epilogue_warps, aligned=("size",))
    )
    wgrad = {
        "left_ptr": rows,
        "right_ptr": rows,
        "stops_ptr": "*i32",
        "experts": "i32",
        "partial_ptr": "*fp32",
        "height": "i32",
    }
    wgrad |= {"columns": "i32"} | dict.fromkeys(
        ["WHOLE", "PRECISION", "CHUNK", "HEIGHT", "COLUMNS", "DEPTH"], "constexpr"
    )
    constants = {"WHOLE": True, "PRECISION": "tf32", "CHUNK": tiles.chunk}
    constants |= dict(zip(("HEIGHT", "COLUMNS", "DEPTH"), tiles.wgrad, strict=True))
    found.append(
        Configuration(
            "expert_mlp/wgrad",
            _weight_gradient_kernel,
            wgrad,
            constants,
            tiles.wgrad_warps,
            tiles.stages,
            tensor_cores=True,
            aligned=("height", "columns"),
        )
    )
    norm = {
        "x_ptr": rows,
        "index_ptr": "*i64",
        "stops_ptr": "*i32",
        "experts": "i32",
        "weights_ptr": "*i64",
        "vector_ptr": rows,
    }
    norm |= {"normed_ptr": rows, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "width": "i32"}
    norm |= {"eps": "fp32", "HAS_INDEX": "constexpr", "ROWS": "constexpr", "BLOCK": "constexpr"}
    last = {
        "dnormed_ptr": rows,
        "x_ptr": rows,
        "dout_ptr": rows,
        "index_ptr": "*i64",
        "stops_ptr": "*i32",
        "experts": "i32",
    }
    last |= {"weights_ptr": "*i64", "vector_ptr": rows, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": rows}
    last |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "width": "i32"}
    last |= dict.fromkeys(["HAS_INDEX", "PIECE", "ROWS", "BLOCK"], "constexpr")
    whole = {"HAS_INDEX": True, "ROWS": NORM_ROWS, "BLOCK": norm_block(768)[0]}
    branch = {
        "dout_ptr": rows,
        "index_ptr": "*i64",
        "row_scale_ptr": rows,
        "stops_ptr": "*i32",
        "experts": "i32",
        "scales_ptr": "*i64",
    }
    branch |= {"vector_ptr": rows, "u_ptr": rows, "dt_ptr": rows, "sums_ptr": "*fp32", "width": "i32"}
    pieces = {"HAS_INDEX": True, "HAS_SCALE": True, "HAS_ROW_SCALE": True, "KEEP": True}
    pieces |= dict(zip(("ROWS", "COLUMNS"), tiles.epilogue, strict=True))
    branch |= dict.fromkeys(pieces, "constexpr")
    for name, kernel, signature, constants, warps in (
        ("norm", _norm_kernel, norm, whole, norm_block(768)[1]),
        ("norm_backward", _norm_backward_kernel, last, whole | {"PIECE": tiles.norm}, norm_block(768)[1]),
        ("branch_gradient", _branch_gradient_kernel, branch, pieces, tiles.epilogue_warps),
    ):
        found.append(Configuration(f"expert_mlp/{name}", kernel, signature, constants, warps, aligned=("width",)))
    return found
