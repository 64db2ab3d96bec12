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

from mmd2v_kernels.configuration import TRITON_NAMES, Configuration

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
    width,  # D
    eps,
    BLOCK: tl.constexpr,  # D, up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, total, mask=inside)
    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, centred * rstd * weight + bias, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


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
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + column
        normed = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, normed * rstd, 0.0)
        dnormed = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dweight += dnormed * normed
        dbias += dnormed
        dnormed *= weight
        mean_d = tl.sum(dnormed, axis=0) / width
        mean_dn = tl.sum(dnormed * normed, axis=0) / width
        dx = (dnormed - mean_d - normed * mean_dn) * rstd
        dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(dweight_ptr + program * width + column, dweight, mask=inside)
    tl.store(dbias_ptr + program * width + column, dbias, mask=inside)


def _warps(width: int) -> int:
    return max(1, min(8, triton.next_power_of_2(width) // 256))


@torch.library.custom_op("mmd2v::add_layer_norm", mutates_args=())
def _forward(
    x_TD: torch.Tensor, branch_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = x_TD.shape
    sum_TD, normed_TD = (torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    mean_T, rstd_T = (torch.empty(rows, dtype=torch.float32, device=x_TD.device) for _ in range(2))
    if rows:
        _forward_kernel[(rows,)](
            x_TD.contiguous(),
            branch_TD.contiguous(),
            weight_D.contiguous(),
            bias_D.contiguous(),
            sum_TD,
            normed_TD,
            mean_T,
            rstd_T,
            width,
            eps,
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
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
    dx_TD = torch.empty_like(sum_TD)
    programs = min(rows, _PROGRAMS)
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
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
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
    # Two tensors: a gradient may be changed in place by whoever gets it.
    return dx_TD, dx_TD.clone() if ctx.needs_input_grad[0] else dx_TD, dweight_D, dbias_D, None


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
        constants = {"BLOCK": triton.next_power_of_2(width)}
        forward = dict.fromkeys(["x_ptr", "branch_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "normed_ptr"], rows)
        forward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "width": "i32", "eps": "fp32", "BLOCK": "constexpr"}
        backward = dict.fromkeys(["dsum_ptr", "dnormed_ptr", "sum_ptr", "weight_ptr"], rows)
        backward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": rows}
        backward |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "rows": "i32", "width": "i32", "BLOCK": "constexpr"}
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
                    warps=_warps(width),
                    aligned=("width",),
                )
            )
    return found
