"""Triton kernels of the contrastive losses: one pass over a chunk of logits each, in place of several by torch.

The products that make the logits, and those of their gradient with the embeddings, are the library's. A chunk (16 MB)
stays in the cache of a large GPU between them.

Deterministic: every sum has one order, and nothing is added to memory that another program may write.

Shapes: n rows and M columns of the chunk; a tile of r × c of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import Configuration
from mmd2v_kernels.logit_chunks import Positives, Sigmoid, Softmax

__all__ = ["configurations", "fold", "sigmoid_gradient_", "softmax_gradient_"]


@dataclass(frozen=True)
class Sizes:
    """Tiles: how much of the logits a program has at a time."""

    fold_rows: tuple[int, int] = (1, 2048)
    fold_columns: tuple[int, int] = (32, 64)
    gradient: tuple[int, int] = (4, 512)
    warps: int = 4


SIZES = Sizes()


@triton.jit
def _fold_kernel(
    logits_ptr,  # fp32 [n, M]
    offset_ptr,  # fp32 [M], by columns [n]; without one, anything
    largest_ptr,  # fp32 [n], by columns [M]; in and out
    total_ptr,  # fp32, likewise
    rows,  # n
    columns,  # M
    BY_COLUMNS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,  # r
    COLUMNS: tl.constexpr,  # c
):
    # A program goes along its rows, or down its columns; each place of the tile has a running sum of its own, so that
    # nothing is exchanged between threads before the end.
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    if BY_COLUMNS:
        column += tl.program_id(0) * COLUMNS
        steps = tl.cdiv(rows, ROWS)
    else:
        row += tl.program_id(0) * ROWS
        steps = tl.cdiv(columns, COLUMNS)
    lowest = -3.4028234663852886e38  # of fp32, not -inf: the difference of two of them would be NaN
    largest = tl.full([ROWS, COLUMNS], lowest, dtype=tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(0, steps):
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        x = tl.load(logits_ptr + at, mask=inside, other=lowest)
        if HAS_OFFSET:
            if BY_COLUMNS:
                x += tl.load(offset_ptr + row, mask=row < rows, other=0.0)[:, None]
            else:
                x += tl.load(offset_ptr + column, mask=column < columns, other=0.0)[None, :]
        now = tl.maximum(largest, x)
        total = total * tl.exp(largest - now) + tl.exp(x - now)
        largest = now
        if BY_COLUMNS:
            row += ROWS
        else:
            column += COLUMNS
    # What was masked off has the lowest number there is, and counts nothing beside any other.
    if BY_COLUMNS:
        at, counts = column, column < columns
        before = tl.load(largest_ptr + at, mask=counts, other=0.0)
        together = tl.maximum(tl.max(largest, axis=0), before)
        added = tl.sum(total * tl.exp(largest - together[None, :]), axis=0)
    else:
        at, counts = row, row < rows
        before = tl.load(largest_ptr + at, mask=counts, other=0.0)
        together = tl.maximum(tl.max(largest, axis=1), before)
        added = tl.sum(total * tl.exp(largest - together[:, None]), axis=1)
    added += tl.load(total_ptr + at, mask=counts, other=0.0) * tl.exp(before - together)
    tl.store(largest_ptr + at, together, mask=counts)
    tl.store(total_ptr + at, added, mask=counts)


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr,  # fp32 [n, M] in, the gradient out
    row_largest_ptr,  # fp32 [n]
    row_factor_ptr,  # fp32 [n]
    column_offset_ptr,  # fp32 [M] added to the logits of the rows' softmaxes; without one, anything
    column_largest_ptr,  # fp32 [M]; without softmaxes of columns, anything, as the next two
    column_factor_ptr,  # fp32 [M]
    row_offset_ptr,  # fp32 [n]
    index_ptr,  # int64 [n] the column of each row's positive, or [M] the row of each column's
    weight_ptr,  # fp32, likewise
    rows,  # n
    columns,  # M
    HAS_COLUMN_OFFSET: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ROW_OFFSET: tl.constexpr,
    POSITIVES: tl.constexpr,  # 0 none, 1 one a row, 2 one a column
    ROWS: tl.constexpr,  # r
    COLUMNS: tl.constexpr,  # c
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    inside = is_row[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(logits_ptr + at, mask=inside, other=0.0)
    of_row = x
    if HAS_COLUMN_OFFSET:
        of_row += tl.load(column_offset_ptr + column, mask=is_column, other=0.0)[None, :]
    gradient = tl.exp(of_row - tl.load(row_largest_ptr + row, mask=is_row, other=0.0)[:, None])
    gradient *= tl.load(row_factor_ptr + row, mask=is_row, other=0.0)[:, None]
    if HAS_COLUMNS:
        of_column = x
        if HAS_ROW_OFFSET:
            of_column += tl.load(row_offset_ptr + row, mask=is_row, other=0.0)[:, None]
        other = tl.exp(of_column - tl.load(column_largest_ptr + column, mask=is_column, other=0.0)[None, :])
        gradient += other * tl.load(column_factor_ptr + column, mask=is_column, other=0.0)[None, :]
    if POSITIVES == 1:
        index = tl.load(index_ptr + row, mask=is_row, other=-1)
        weight = tl.load(weight_ptr + row, mask=is_row, other=0.0)
        gradient -= tl.where(index[:, None] == column[None, :], weight[:, None], 0.0)
    if POSITIVES == 2:
        index = tl.load(index_ptr + column, mask=is_column, other=-1)
        weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)
        gradient -= tl.where(index[None, :] == row[:, None], weight[None, :], 0.0)
    tl.store(logits_ptr + at, gradient, mask=inside)


@triton.jit
def _sigmoid_gradient_kernel(
    logits_ptr,  # fp32 [n, M] in, the gradient out
    bias_ptr,  # fp32 [1]
    positive_ptr,  # int64 [M] the row of each column's positive
    row_weight_ptr,  # fp32 [n]; without weights, anything
    column_weight_ptr,  # fp32 [M]
    sums_ptr,  # fp32 [2, programs] out: of the loss and of the gradient
    rows,  # n
    columns,  # M
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,  # r
    COLUMNS: tl.constexpr,  # c
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    inside = is_row[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(logits_ptr + at, mask=inside, other=0.0) + tl.load(bias_ptr)
    positive = tl.load(positive_ptr + column, mask=is_column, other=-1)
    sign = tl.where(positive[None, :] == row[:, None], -1.0, 1.0)
    x *= sign
    # softplus(x) and sigmoid(x) of one exponential that cannot overflow.
    small = tl.exp(-tl.abs(x))
    loss = tl.maximum(x, 0.0) + _log_1_plus(small)
    gradient = sign * tl.where(x > 0, 1.0, small) / (1.0 + small)
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_WEIGHTS:
        weight *= tl.load(row_weight_ptr + row, mask=is_row, other=0.0)[:, None]
        weight *= tl.load(column_weight_ptr + column, mask=is_column, other=0.0)[None, :]
    gradient *= weight
    tl.store(logits_ptr + at, gradient, mask=inside)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums_ptr + program, tl.sum(tl.sum(loss * weight, axis=1), axis=0))
    tl.store(sums_ptr + programs + program, tl.sum(tl.sum(gradient, axis=1), axis=0))


@triton.jit
def _log_1_plus(x):
    """log(1 + x) of x in [0, 1], without the loss of a small x beside 1 (Goldberg 1991, theorem 4)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@torch.library.custom_op("mmd2v::fold_logits", mutates_args=("largest", "total"))
def _fold(
    largest: torch.Tensor, total: torch.Tensor, logits_nM: torch.Tensor, offset: torch.Tensor | None, dim: int
) -> None:
    rows, columns = logits_nM.shape
    tile = SIZES.fold_rows if dim == 1 else SIZES.fold_columns
    programs = triton.cdiv(rows, tile[0]) if dim == 1 else triton.cdiv(columns, tile[1])
    if programs and logits_nM.numel():
        _fold_kernel[(programs,)](
            logits_nM,
            logits_nM if offset is None else offset,
            largest,
            total,
            rows,
            columns,
            BY_COLUMNS=dim == 0,
            HAS_OFFSET=offset is not None,
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=SIZES.warps,
        )


@torch.library.custom_op("mmd2v::softmax_gradient_", mutates_args=("logits_nM",))
def _softmax_gradient_(
    logits_nM: torch.Tensor,
    row_largest_n: torch.Tensor,
    row_factor_n: torch.Tensor,
    column_offset_M: torch.Tensor | None,
    column_largest_M: torch.Tensor | None,
    column_factor_M: torch.Tensor | None,
    row_offset_n: torch.Tensor | None,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    in_rows: bool,
) -> None:
    if not logits_nM.numel():
        return
    rows, columns = logits_nM.shape
    tile = SIZES.gradient
    optional = (column_offset_M, column_largest_M, column_factor_M, row_offset_n, index, weight)
    _softmax_gradient_kernel[(triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0]))](
        logits_nM,
        row_largest_n,
        row_factor_n,
        *(logits_nM if tensor is None else tensor for tensor in optional),
        rows,
        columns,
        HAS_COLUMN_OFFSET=column_offset_M is not None,
        HAS_COLUMNS=column_largest_M is not None,
        HAS_ROW_OFFSET=row_offset_n is not None,
        POSITIVES=0 if index is None else 1 if in_rows else 2,
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=SIZES.warps,
    )


@torch.library.custom_op("mmd2v::sigmoid_gradient_", mutates_args=("logits_nM",))
def _sigmoid_gradient_(
    logits_nM: torch.Tensor,
    bias: torch.Tensor,
    positive_M: torch.Tensor,
    weight_n: torch.Tensor | None,
    weight_M: torch.Tensor | None,
) -> torch.Tensor:
    rows, columns = logits_nM.shape
    tile = SIZES.gradient
    grid = (triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0]))
    sums_2P = torch.empty(2, grid[0] * grid[1], dtype=torch.float32, device=logits_nM.device)
    weighted = weight_n is not None and weight_M is not None
    if logits_nM.numel():
        _sigmoid_gradient_kernel[grid](
            logits_nM,
            bias,
            positive_M,
            weight_n if weighted else logits_nM,
            weight_M if weighted else logits_nM,
            sums_2P,
            rows,
            columns,
            HAS_WEIGHTS=weighted,
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=SIZES.warps,
        )
    return sums_2P.sum(1)


@_sigmoid_gradient_.register_fake
def _(logits_nM, bias, positive_M, weight_n, weight_M):
    return logits_nM.new_empty(2)


def fold(
    largest: torch.Tensor, total: torch.Tensor, logits_nM: torch.Tensor, offset: torch.Tensor | None, dim: int
) -> None:
    """Do what `LogitChunks.fold` says, for contiguous fp32 logits."""
    _fold(largest, total, logits_nM, offset, dim)


def softmax_gradient_(
    logits_nM: torch.Tensor, of_rows: Softmax, of_columns: Softmax | None, positives: Positives | None
) -> torch.Tensor:
    """Do what `LogitChunks.softmax_gradient_` says, for contiguous fp32 logits."""
    index, weight, in_rows = positives or (None, None, False)
    _softmax_gradient_(logits_nM, *of_rows, *(of_columns or (None, None, None)), index, weight, in_rows)
    return logits_nM


def sigmoid_gradient_(logits_nM: torch.Tensor, sigmoid: Sigmoid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `LogitChunks.sigmoid_gradient_` says, for contiguous fp32 logits."""
    loss, by_bias = _sigmoid_gradient_(logits_nM, *sigmoid)
    return loss, by_bias, logits_nM


def configurations() -> list[Configuration]:
    """Return every form: of one rank, of gathered embeddings and of a ring, with and without hidden rows."""
    logits, sizes = {"logits_ptr": "*fp32"}, {"rows": "i32", "columns": "i32"}
    found = []
    state = {"offset_ptr": "*fp32", "largest_ptr": "*fp32", "total_ptr": "*fp32"}
    for side, by_columns, tile in (("rows", False, SIZES.fold_rows), ("columns", True, SIZES.fold_columns)):
        for hidden in (False, True):
            constants = {"BY_COLUMNS": by_columns, "HAS_OFFSET": hidden}
            name = f"fold/{side}{'_hidden' * hidden}"
            found.append(_configuration(name, _fold_kernel, logits | state | sizes, constants, tile))
    vectors = ("row_largest", "row_factor", "column_offset", "column_largest", "column_factor", "row_offset")
    signature = logits | {f"{name}_ptr": "*fp32" for name in vectors}
    signature |= {"index_ptr": "*i64", "weight_ptr": "*fp32"} | sizes
    for name, of_columns, positives in (
        ("one_rank", True, 1),
        ("ring_home", True, 2),
        ("ring_away", True, 0),
        ("images", False, 2),
        ("captions", False, 1),
    ):
        for hidden in (False, True):
            constants = {"HAS_COLUMN_OFFSET": hidden, "HAS_COLUMNS": of_columns}
            constants |= {"HAS_ROW_OFFSET": hidden and of_columns, "POSITIVES": positives}
            full_name = f"softmax_gradient/{name}{'_hidden' * hidden}"
            found.append(_configuration(full_name, _softmax_gradient_kernel, signature, constants, SIZES.gradient))
    signature = logits | {"bias_ptr": "*fp32", "positive_ptr": "*i64", "row_weight_ptr": "*fp32"}
    signature |= {"column_weight_ptr": "*fp32", "sums_ptr": "*fp32"} | sizes
    for name, weighted in (("plain", False), ("weighted", True)):
        constants = {"HAS_WEIGHTS": weighted}
        found.append(
            _configuration(f"sigmoid_gradient/{name}", _sigmoid_gradient_kernel, signature, constants, SIZES.gradient)
        )
    return found


def _configuration(
    name: str, kernel: object, signature: dict[str, str], constants: dict[str, object], tile: tuple[int, int]
) -> Configuration:
    constants = constants | {"ROWS": tile[0], "COLUMNS": tile[1]}
    return Configuration(
        name=f"contrastive/{name}",
        kernel=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        warps=SIZES.warps,
        aligned=("columns",),
    )
