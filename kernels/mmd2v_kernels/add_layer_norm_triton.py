"""Triton kernels of `add_layer_norm`: one pass forward, one backward, as custom operators.

Both move each element once: 8 bytes forward (two read, two written in bf16) and 8 backward. A program of the backward
pass sums the weights' gradients over its rows and writes one partial row, which torch adds up: no atomics, so the
result is the same every time.

Shapes: T rows, D width, P programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import NORM_ROWS, TRITON_NAMES, Configuration, norm_block
from mmd2v_kernels.layer_norm_formulas import centre_rows, rows_gradient

__all__ = ["add_layer_norm", "configurations"]

_PROGRAMS = 528
"""Of the backward pass, at most: four a multiprocessor of an H100."""


@triton.jit
def _forward_kernel(
    x_ptr,  # [T, D]
    branch_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    sum_ptr,  # [T, D] out
    normed_ptr,  # [T, D] out
    mean_ptr,  # fp32 [T] out
    rstd_ptr,  # fp32 [T] out
    rows,  # T
    width,  # D
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # D, up to a power of two
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row, is_column = row < rows, column < width
    inside = is_row[:, None] & is_column[None, :]
    at = row[:, None] * width + column[None, :]
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, total, mask=inside)
    centred, mean, rstd = centre_rows(total, inside, width, eps)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, centred * rstd[:, None] * weight[None, :] + bias[None, :], mask=inside)
    tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)


@triton.jit
def _backward_kernel(
    dsum_ptr,  # [T, D] gradient of the sum
    dnormed_ptr,  # [T, D] gradient of the norm's output
    sum_ptr,  # [T, D]
    weight_ptr,  # [D]
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    dx_ptr,  # [T, D] out: of both terms of the sum
    dweight_ptr,  # fp32 [P, D] out
    dbias_ptr,  # fp32 [P, D] out
    rows,  # T
    width,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < rows
        inside = is_row[:, None] & is_column[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)[:, None]
        normed = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (normed - mean) * rstd, 0.0)
        dnormed = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dweight += dnormed * normed
        dbias += dnormed
        dnormed *= weight[None, :]
        dx = rows_gradient(dnormed, normed, rstd, width)
        dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=is_column)
    tl.store(dbias_ptr + program * width + column, tl.sum(dbias, axis=0), mask=is_column)


@torch.library.custom_op("mmd2v::add_layer_norm", mutates_args=())
def _forward(
    x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = x_TD.shape
    block, warps = norm_block(width)
    sum_TD, normed_TD = (torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    mean_T, rstd_T = (torch.empty(rows, dtype=torch.float32, device=x_TD.device) for _ in range(2))
    if rows:
        _forward_kernel[(triton.cdiv(rows, NORM_ROWS),)](
            x_TD.contiguous(),
            branch_TD.contiguous(),
            weight_D.contiguous(),
            bias_D.contiguous(),
            sum_TD,
            normed_TD,
            mean_T,
            rstd_T,
            rows,
            width,
            eps,
            ROWS=NORM_ROWS,
            BLOCK=block,
            num_warps=warps,
        )
    return sum_TD, normed_TD, mean_T, rstd_T


@_forward.register_fake
def _(x_TD, branch_TD, weight_D, bias_D, eps):
    sum_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    mean_T = torch.empty(x_TD.shape[:1], dtype=torch.float32, device=x_TD.device)
    return sum_TD, torch.empty_like(sum_TD), mean_T, torch.empty_like(mean_T)


@torch.library.custom_op("mmd2v::add_layer_norm_backward", mutates_args=())
def _backward(
    dsum_TD: torch.Tensor,
    dnormed_TD: torch.Tensor,
    sum_TD: torch.Tensor,
    weight_D: torch.Tensor,
    mean_T: torch.Tensor,
    rstd_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = sum_TD.shape
    block, warps = norm_block(width)
    dx_TD = torch.empty_like(sum_TD)
    programs = min(triton.cdiv(rows, NORM_ROWS), _PROGRAMS)
    dweight_PD, dbias_PD = (torch.empty(programs, width, dtype=torch.float32, device=sum_TD.device) for _ in range(2))
    if rows:
        _backward_kernel[(programs,)](
            dsum_TD.contiguous(),
            dnormed_TD.contiguous(),
            sum_TD,
            weight_D.contiguous(),
            mean_T,
            rstd_T,
            dx_TD,
            dweight_PD,
            dbias_PD,
            rows,
            width,
            ROWS=NORM_ROWS,
            BLOCK=block,
            num_warps=warps,
        )
    return dx_TD, dweight_PD.sum(dim=0).to(weight_D.dtype), dbias_PD.sum(dim=0).to(weight_D.dtype)


@_backward.register_fake
def _(dsum_TD, dnormed_TD, sum_TD, weight_D, mean_T, rstd_T):
    return torch.empty_like(sum_TD), torch.empty_like(weight_D), torch.empty_like(weight_D)


def _set_up(ctx, inputs, output):
    _, _, weight_D, _, _ = inputs
    sum_TD, _, mean_T, rstd_T = output
    ctx.save_for_backward(sum_TD, weight_D, mean_T, rstd_T)


def _differentiate(ctx, dsum_TD, dnormed_TD, *_):
    dx_TD, dweight_D, dbias_D = _backward(dsum_TD, dnormed_TD, *ctx.saved_tensors)
    return dx_TD, dx_TD, dweight_D, dbias_D, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def add_layer_norm(
    x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `mmd2v_kernels.add_layer_norm` says."""
    return _forward(x_TD, branch_TD, weight_D, bias_D, eps)[:2]


def configurations() -> list[Configuration]:
    """Return the forms for a width of 768 (of any up to 1024, but for the masks)."""
    found = []
    for dtype in ("bfloat16", "float32"):
        rows, width = f"*{TRITON_NAMES[dtype]}", 768
        constants = {"ROWS": NORM_ROWS, "BLOCK": norm_block(width)[0]}
        forward = dict.fromkeys(["x_ptr", "branch_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "normed_ptr"], rows)
        forward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "rows": "i32", "width": "i32", "eps": "fp32"}
        forward |= dict.fromkeys(constants, "constexpr")
        backward = dict.fromkeys(["dsum_ptr", "dnormed_ptr", "sum_ptr", "weight_ptr"], rows)
        backward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": rows}
        backward |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "rows": "i32", "width": "i32"}
        backward |= dict.fromkeys(constants, "constexpr")
        for name, kernel, signature in (
            ("forward", _forward_kernel, forward),
            ("backward", _backward_kernel, backward),
        ):
            found.append(
                Configuration(
                    name=f"add_layer_norm/{name}/{dtype}",
                    kernel=kernel,
                    signature=signature,
                    constants=constants,
                    warps=norm_block(width)[1],
                    aligned=("width",),
                )
            )
    return found
