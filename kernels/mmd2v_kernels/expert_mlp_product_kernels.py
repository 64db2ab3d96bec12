"""Triton kernels of `expert_mlp`'s matrix products, and of what happens to a product before it is written.

GELU is exact to 2e-7 (Abramowitz and Stegun 7.1.26, here with the half of erfc that is asked for), which shares its
exponential with the derivative; in fp32 it is torch's.

Shapes: T rows of ``x``, R rows that pass the experts, E experts, F hidden width; a matrix product has M rows of a tile,
N columns and depth K; P pieces (see `expert_mlp_pieces`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmd2v_kernels.expert_mlp_pieces import find_piece

__all__ = [
    "GELU",
    "GELU_GRADIENT",
    "PLAIN",
    "RESIDUAL",
    "epilogue_kernel",
    "gelu_kernel",
    "product_kernel",
    "weight_gradient_kernel",
]

GELU, RESIDUAL, GELU_GRADIENT, PLAIN = 0, 1, 2, 3
"""What happens to a product before it is written."""


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
def _write(
    product,  # fp32 [M, N], or a half of its columns or a step of its rows
    first,  # int64: the tile's first row
    row,  # int32 [M]: from there on, so that offsets within a tile are of 32 bits and cost half the registers
    is_row,  # bool [M]
    column,  # int32 [N]
    is_column,  # bool [N]
    expert,
    biases_ptr,  # this and what follows: see `product_kernel`
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
def product_kernel(
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
    """Multiply a tile of one expert's rows with a tile of its weight, and do what EPILOGUE says."""
    blocks = tl.cdiv(columns, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = find_piece(tile, stops_ptr, experts, ROWS)
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
def epilogue_kernel(
    raw_ptr,  # [R, N] the product; may be the memory of an output
    stops_ptr,  # int32 [E] end of each expert's rows
    experts,  # E
    biases_ptr,  # this and what follows: see `product_kernel`
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
    """Do what EPILOGUE says with a tile of a product that the library wrote."""
    # Programs that run together share rows: their columns lie beside one another in memory.
    blocks = tl.cdiv(columns, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, first, end = find_piece(tile, stops_ptr, experts, ROWS)
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
def gelu_kernel(
    h_ptr,  # [R, F], of any number of experts: the library has added the bias
    out_ptr,  # [R, F] out; may be the same memory
    size,  # R · F
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write GELU of what the library wrote."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    g, _ = _gelu(h, EXACT)
    tl.store(out_ptr + at, g, mask=at < size)


@triton.jit
def weight_gradient_kernel(
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
    """Write a tile of leftᵀ right over one chunk of an expert's rows."""
    blocks = tl.cdiv(columns, COLUMNS)
    chunk = tl.program_id(1)
    _, row, end = find_piece(chunk, stops_ptr, experts, CHUNK)
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
