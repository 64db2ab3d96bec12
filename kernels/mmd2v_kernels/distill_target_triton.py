"""Triton kernels of `distill_target` and `distill_loss`, as custom operators without a gradient to the layer results.

Two passes over the layer results, which may lie anywhere: one for the statistics of each channel over the tokens of a
sample, one that normalises, averages, and ends in the target or, without ever writing that, in the loss and its
gradient. Of K layer results in bf16 that is 4K bytes an element, and 4 more for a target.

Deterministic: every sum has one order.

Shapes: K layer results of B samples, T tokens, D width; t and d a tile of tokens and channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import TRITON_NAMES, Configuration
from mmd2v_kernels.host_lists import on_device
from mmd2v_kernels.layer_norm_formulas import centre_rows

__all__ = ["configurations", "distill_loss", "distill_target"]

_TOKENS, _CHANNELS = 32, 64
"""Of a tile of the first pass."""
_ROWS = 8
"""Tokens of a program of the second pass: so many share one reading of the statistics."""
_LOSSES = {"none": 0, "mse": 1, "smooth_l1": 2}


@triton.jit
def _statistics_kernel(
    table_ptr,  # int64 [K] addresses of the layer results
    like_ptr,  # [B, T, D] one of them, for its type
    mask_ptr,  # uint8 [B, T] 1 = a real token
    mean_ptr,  # fp32 [K, B, D] out
    rstd_ptr,  # fp32 [K, B, D] out
    samples,  # B
    tokens,  # T
    width,  # D
    eps,
    HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr,  # t
    CHANNELS: tl.constexpr,  # d
):
    sample, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < width
    results_ptr = tl.load(table_ptr + layer).to(like_ptr.dtype) + sample * tokens * width
    count = 0.0
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    squares = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < tokens
        if HAS_MASK:
            counts = counts & (tl.load(mask_ptr + sample * tokens + token, mask=counts, other=0) != 0)
        inside = counts[:, None] & is_channel[None, :]
        x = tl.load(results_ptr + token[:, None] * width + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        # Each tile has its own mean, and two means are joined exactly (Chan et al. 1979): no difference of squares.
        n = tl.sum(counts.to(tl.float32), axis=0)
        own_mean = tl.sum(x, axis=0) / tl.maximum(n, 1.0)
        centred = tl.where(inside, x - own_mean[None, :], 0.0)
        together = tl.maximum(count + n, 1.0)
        shift = own_mean - mean
        squares += tl.sum(centred * centred, axis=0) + shift * shift * (count * n / together)
        mean += shift * (n / together)
        count += n
    at = (layer * samples + sample) * width + channel
    tl.store(mean_ptr + at, mean, mask=is_channel)
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt(squares / tl.maximum(count, 1.0) + eps), mask=is_channel)


@triton.jit
def _target_kernel(
    table_ptr,  # int64 [K]
    like_ptr,  # [B, T, D]
    mask_ptr,  # uint8 [B, T]
    mean_ptr,  # fp32 [K, B, D]
    rstd_ptr,  # fp32 [K, B, D]
    prediction_ptr,  # [B, T, D]
    target_ptr,  # fp32 [B, T, D] out, without a loss
    loss_ptr,  # fp32 [B, T] out, with one
    slope_ptr,  # like the prediction [B, T, D] out: derivative of D · loss by it
    layers,  # K
    samples,  # B
    tokens,  # T
    width,  # D
    eps,
    beta,  # where smooth L1 turns from a square into a line
    HAS_MASK: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    LOSS: tl.constexpr,  # 0 none, 1 mean square, 2 smooth L1
    ROWS: tl.constexpr,  # t
    BLOCK: tl.constexpr,  # D, up to a power of two
):
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    is_token, is_channel = token < tokens, channel < width
    inside = is_token[:, None] & is_channel[None, :]
    at = (sample * tokens + token[:, None]) * width + channel[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for layer in range(0, layers):
        results_ptr = tl.load(table_ptr + layer).to(like_ptr.dtype)
        of_channel = (layer * samples + sample) * width + channel
        mean = tl.load(mean_ptr + of_channel, mask=is_channel, other=0.0)
        rstd = tl.load(rstd_ptr + of_channel, mask=is_channel, other=0.0)
        x = tl.load(results_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += (x - mean[None, :]) * rstd[None, :]
    total = tl.where(inside, total / layers, 0.0)
    if LAYER_NORM:
        centred, _, rstd_t = centre_rows(total, inside, width, eps)
        total = centred * rstd_t[:, None]
    if LOSS == 0:
        tl.store(target_ptr + at, total, mask=inside)
    else:
        counts = is_token
        if HAS_MASK:
            counts = counts & (tl.load(mask_ptr + sample * tokens + token, mask=is_token, other=0) != 0)
        prediction = tl.load(prediction_ptr + at, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(counts[:, None] & is_channel[None, :], prediction - total, 0.0)
        if LOSS == 1:
            loss = difference * difference
            slope = 2.0 * difference
        else:
            size = tl.abs(difference)
            steepness = 1.0 / tl.maximum(beta, 1e-30)  # of no use where beta is 0: no size is smaller
            loss = tl.where(size < beta, 0.5 * difference * difference * steepness, size - 0.5 * beta)
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            slope = tl.where(size < beta, difference * steepness, sign)
            loss = tl.where(counts[:, None] & is_channel[None, :], loss, 0.0)
        tl.store(loss_ptr + sample * tokens + token, tl.sum(loss, axis=1) / width, mask=is_token)
        tl.store(slope_ptr + at, slope, mask=inside)


@torch.library.custom_op("mmd2v::distill_target", mutates_args=())
def _target(
    layer_results: Sequence[torch.Tensor], mask_BT: torch.Tensor | None, final_layer_norm: bool, eps: float
) -> torch.Tensor:
    first = layer_results[0]
    target_BTD = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    _launch(layer_results, mask_BT, final_layer_norm, eps, target_BTD, "none", 1.0, target_BTD, target_BTD, target_BTD)
    return target_BTD


@_target.register_fake
def _(layer_results, mask_BT, final_layer_norm, eps):
    return torch.empty(layer_results[0].shape, dtype=torch.float32, device=layer_results[0].device)


@torch.library.custom_op("mmd2v::distill_loss", mutates_args=())
def _loss(
    layer_results: Sequence[torch.Tensor],
    prediction_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None,
    final_layer_norm: bool,
    loss: str,
    beta: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    prediction_BTD = prediction_BTD.contiguous()
    loss_BT = torch.empty(prediction_BTD.shape[:2], dtype=torch.float32, device=prediction_BTD.device)
    slope_BTD = torch.empty_like(prediction_BTD)
    _launch(layer_results, mask_BT, final_layer_norm, eps, prediction_BTD, loss, beta, loss_BT, loss_BT, slope_BTD)
    return loss_BT, slope_BTD


@_loss.register_fake
def _(layer_results, prediction_BTD, mask_BT, final_layer_norm, loss, beta, eps):
    shape, device = prediction_BTD.shape, prediction_BTD.device
    slope_BTD = torch.empty(shape, dtype=prediction_BTD.dtype, device=device)
    return torch.empty(shape[:2], dtype=torch.float32, device=device), slope_BTD


def _set_up(ctx, inputs, output):
    ctx.results = len(inputs[0])
    ctx.save_for_backward(output[1])


def _differentiate(ctx, dloss_BT, _):
    (slope_BTD,) = ctx.saved_tensors
    factor_BT1 = (dloss_BT / slope_BTD.shape[2])[..., None]
    # Into a tensor of the dtype wanted: in fp32 without writing that.
    dprediction_BTD = torch.mul(slope_BTD, factor_BT1, out=torch.empty_like(slope_BTD))
    return [None] * ctx.results, dprediction_BTD, None, None, None, None, None


_loss.register_autograd(_differentiate, setup_context=_set_up)


def _launch(
    layer_results: Sequence[torch.Tensor],
    mask_BT: torch.Tensor | None,
    final_layer_norm: bool,
    eps: float,
    prediction_BTD: torch.Tensor,
    loss: str,
    beta: float,
    target_BTD: torch.Tensor,
    loss_BT: torch.Tensor,
    slope_BTD: torch.Tensor,
) -> None:
    results = [result_BTD.contiguous() for result_BTD in layer_results]
    like, device = results[0], results[0].device
    samples, tokens, width = like.shape
    if like.numel() == 0:
        loss_BT.zero_()
        return
    table_K = on_device([result_BTD.data_ptr() for result_BTD in results], torch.int64, device)
    mask = like if mask_BT is None else mask_BT.contiguous().view(torch.uint8)
    shape = (len(results), samples, width)
    mean_KBD, rstd_KBD = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    _statistics_kernel[(samples, triton.cdiv(width, _CHANNELS), len(results))](
        table_K,
        like,
        mask,
        mean_KBD,
        rstd_KBD,
        samples,
        tokens,
        width,
        eps,
        HAS_MASK=mask_BT is not None,
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
    _target_kernel[(samples, triton.cdiv(tokens, _ROWS))](
        table_K,
        like,
        mask,
        mean_KBD,
        rstd_KBD,
        prediction_BTD,
        target_BTD,
        loss_BT,
        slope_BTD,
        len(results),
        samples,
        tokens,
        width,
        eps,
        beta,
        HAS_MASK=mask_BT is not None,
        LAYER_NORM=final_layer_norm,
        LOSS=_LOSSES[loss],
        ROWS=_ROWS,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )


def distill_target(
    layer_results: Sequence[torch.Tensor], mask_BT: torch.Tensor | None, final_layer_norm: bool, eps: float
) -> torch.Tensor:
    """Do what `mmd2v_kernels.distill_target` says, for layer results that need no gradient."""
    return _target(list(layer_results), mask_BT, final_layer_norm, eps)


def distill_loss(
    layer_results: Sequence[torch.Tensor],
    prediction_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None,
    final_layer_norm: bool,
    loss: str,
    beta: float,
    eps: float,
) -> torch.Tensor:
    """Do what `mmd2v_kernels.distill_loss` says, for layer results that need no gradient."""
    return _loss(list(layer_results), prediction_BTD, mask_BT, final_layer_norm, loss, beta, eps)[0]


def configurations() -> list[Configuration]:
    """Return the forms for a width of 768: images (LayerNorm, no mask) and text (mask, no LayerNorm)."""
    found = []
    rows = f"*{TRITON_NAMES['bfloat16']}"
    first = {"table_ptr": "*i64", "like_ptr": rows, "mask_ptr": "*u8", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    sizes = {"samples": "i32", "tokens": "i32", "width": "i32", "eps": "fp32"}
    for name, masked, layer_norm, loss in (("image", False, True, "none"), ("text", True, False, "smooth_l1")):
        statistics = first | sizes | dict.fromkeys(["HAS_MASK", "TOKENS", "CHANNELS"], "constexpr")
        found.append(
            Configuration(
                name=f"distill_target/statistics/{name}",
                kernel=_statistics_kernel,
                signature=statistics,
                constants={"HAS_MASK": masked, "TOKENS": _TOKENS, "CHANNELS": _CHANNELS},
                warps=4,
                aligned=("width",),
            )
        )
        target = first | {"prediction_ptr": rows, "target_ptr": "*fp32", "loss_ptr": "*fp32", "slope_ptr": rows}
        target |= {"layers": "i32"} | sizes | {"beta": "fp32"}
        target |= dict.fromkeys(["HAS_MASK", "LAYER_NORM", "LOSS", "ROWS", "BLOCK"], "constexpr")
        constants = {"HAS_MASK": masked, "LAYER_NORM": layer_norm, "LOSS": _LOSSES[loss], "ROWS": _ROWS, "BLOCK": 1024}
        found.append(
            Configuration(
                name=f"distill_target/{'target' if loss == 'none' else loss}/{name}",
                kernel=_target_kernel,
                signature=target,
                constants=constants,
                warps=8,
                aligned=("width",),
            )
        )
    return found
