"""Triton kernels of `expert_mlp`: all experts in one launch a part; kept are the input, its norm and h.

The rows of all experts, in the order of the index, are cut into tiles that lie within one expert each. Parts: 1
LayerNorm and gather; 2 fc1, bias and GELU; 3 fc2, bias, scales, residual and scatter; 4 gather and scales backward,
then the gradient of h, with GELU computed again and fc1's bias gradient as partial sums; 5 weight gradients, each
expert's rows cut into chunks, so that there are more pieces of work than the tiles of a weight; 6 the gradient of the
norm's output; 7 the norm backward, residual and scatter.

Parts 2 to 6 are matrix products (`expert_mlp_products`).
Deterministic: no atomics, partial sums are added in one order.

Shapes: T rows of ``x``, R rows that pass the experts, D width, F hidden width; P pieces of one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton

from mmd2v_kernels.configuration import NORM_ROWS, norm_block
from mmd2v_kernels.expert_mlp_configurations import TILES, Tiles, configurations
from mmd2v_kernels.expert_mlp_pieces import count_pieces, sum_per_expert, upload_addresses, upload_stops
from mmd2v_kernels.expert_mlp_product_kernels import GELU, GELU_GRADIENT, PLAIN, RESIDUAL
from mmd2v_kernels.expert_mlp_products import multiply, weight_gradient
from mmd2v_kernels.expert_mlp_row_kernels import branch_gradient_kernel, norm_backward_kernel, norm_kernel

if TYPE_CHECKING:
    from mmd2v_kernels.expert_mlp import Expert

__all__ = ["configurations", "triton_expert_mlp"]


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
    norm_kernel[(sum(count_pieces(rows, NORM_ROWS)),)](
        x_TD,
        x_TD if index_R is None else index_R,
        upload_stops(rows, device),
        len(experts),
        upload_addresses([e[0] for e in experts] + [e[1] for e in experts]),
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
    multiply(GELU, normed_RD, fc1, rows, g_RF, tiles, biases=[e[3] for e in experts], h_RN=h_RF if keep else None)
    multiply(
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
    db1 = multiply(GELU_GRADIENT, dt_RD, fc2, rows, dh_RF, tiles, transposed=True, h_RN=h_RF, x=g_RF)
    dw2 = weight_gradient(u_RD, g_RF, rows, tiles)
    del g_RF, u_RD
    dw1 = weight_gradient(dh_RF, normed_RD, rows, tiles)
    dnormed_RD = dt_RD if dt_RD is not dout_TD else torch.empty_like(dt_RD)  # its memory is not needed any more
    multiply(PLAIN, dh_RF, fc1, rows, dnormed_RD, tiles, transposed=True)
    pieces, (block, warps) = count_pieces(rows, tiles.norm), norm_block(width)
    partial_2PD = torch.empty(2, sum(pieces), width, dtype=torch.float32, device=device)
    norm_backward_kernel[(sum(pieces),)](
        dnormed_RD,
        x_TD,
        dout_TD,
        x_TD if index_R is None else index_R,
        upload_stops(rows, device),
        len(experts),
        upload_addresses([e[0] for e in experts]),
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
    dnorm_weight, dnorm_bias = (sum_per_expert(p, pieces) for p in partial_2PD)
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
    pieces = count_pieces(rows, height)
    sums_PD = torch.empty(sum(pieces), shape[1], dtype=torch.float32, device=device)
    branch_gradient_kernel[(sum(pieces) * triton.cdiv(shape[1], wide),)](
        dout_TD,
        dout_TD if index_R is None else index_R,
        dout_TD if row_scale_T is None else row_scale_T,
        upload_stops(rows, device),
        len(experts),
        upload_addresses([e[6] for e in experts]) if scaled else dout_TD,
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
    return u_RD, dt_RD, sum_per_expert(sums_PD, pieces)


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
