"""The matrix products of `expert_mlp` (parts 2 to 6), each by our kernel or by the library's.

`mmd2v_kernels.dispatch` says by which. The library's runs on each expert's slice, with one kernel after it for what
happens to the result.

Shapes: T rows of ``x``, R rows that pass the experts, D width, F hidden width; a matrix product has N columns and depth
K, a weight's gradient M rows and N columns; P pieces of one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from mmd2v_kernels.dispatch import choose_part
from mmd2v_kernels.expert_mlp_configurations import Tiles
from mmd2v_kernels.expert_mlp_pieces import count_pieces, sum_per_expert, upload_addresses, upload_stops
from mmd2v_kernels.expert_mlp_product_kernels import (
    GELU,
    GELU_GRADIENT,
    PLAIN,
    RESIDUAL,
    epilogue_kernel,
    gelu_kernel,
    product_kernel,
    weight_gradient_kernel,
)

__all__ = ["multiply", "weight_gradient"]

_PARTS = {GELU: "fc1", RESIDUAL: "fc2", GELU_GRADIENT: "dgrad2", PLAIN: "dgrad1"}
"""Epilogue → the part that ends with it, as `mmd2v_kernels.measured` names it."""


def multiply(
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
    raw = None
    if by_library:
        raw = _library_product(epilogue, a_RK, weights, rows, out, transposed=transposed, biases=biases, h_RN=h_RN)
        if epilogue == PLAIN:
            return []
        if epilogue == GELU:
            _gelu(raw, out, tiles)
            return []
        height, wide = tiles.epilogue
    else:
        height, wide = tiles.rows, tiles.gelu_columns if epilogue in (GELU, GELU_GRADIENT) else tiles.columns
    pieces = count_pieces(rows, height)
    count = sum(pieces)
    sums_PN = torch.empty(count if epilogue == GELU_GRADIENT else 0, columns, dtype=torch.float32, device=device)
    vectors = [*biases, *scales] or [a_RK]
    nothing = a_RK
    where = (
        upload_addresses(biases) if biases else nothing,
        upload_addresses(scales) if scales else nothing,
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
        "HAS_BIAS": bool(biases),
        "KEEP": h_RN is not None,
        "EXACT": a_RK.dtype == torch.float32,
        "ROWS": height,
        "COLUMNS": wide,
    }
    stops_E = upload_stops(rows, device)
    if raw is not None:
        epilogue_kernel[(count * triton.cdiv(columns, wide),)](
            raw, stops_E, len(rows), *where, **how, STEP=min(height, tiles.step), num_warps=tiles.epilogue_warps
        )
    else:
        product_kernel[(count * triton.cdiv(columns, wide),)](
            a_RK,
            stops_E,
            len(rows),
            upload_addresses(weights),
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
    return sum_per_expert(sums_PN, pieces) if epilogue == GELU_GRADIENT else []


def _library_product(
    epilogue: int,
    a_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    rows: Sequence[tuple[int, int]],
    out: torch.Tensor,
    *,
    transposed: bool,
    biases: Sequence[torch.Tensor],
    h_RN: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product of each expert's rows with its weight, [R, N]; before GELU with the bias.

    It lies in the memory of a result where one has its shape: each program of the kernel that follows reads its piece
    before it writes it.
    """
    if epilogue == RESIDUAL:
        columns = weights[0].shape[1] if transposed else weights[0].shape[0]
        raw_RN = torch.empty(len(a_RK), columns, dtype=a_RK.dtype, device=a_RK.device)
    else:
        raw_RN = h_RN if epilogue == GELU and h_RN is not None else out
    for i, (start, stop) in enumerate(rows):
        if start == stop:
            continue
        weight = weights[i] if transposed else weights[i].t()
        if epilogue == GELU:  # the library adds the bias at no cost, and h is written but once
            torch.addmm(biases[i].to(a_RK.dtype), a_RK[start:stop], weight, out=raw_RN[start:stop])
        else:
            torch.mm(a_RK[start:stop], weight, out=raw_RN[start:stop])
    return raw_RN


def _gelu(h_RF: torch.Tensor, out_RF: torch.Tensor, tiles: Tiles) -> None:
    gelu_kernel[(triton.cdiv(h_RF.numel(), tiles.flat),)](
        h_RF,
        out_RF,
        h_RF.numel(),
        EXACT=h_RF.dtype == torch.float32,
        BLOCK=tiles.flat,
        num_warps=tiles.epilogue_warps,
    )


def weight_gradient(
    left_RM: torch.Tensor, right_RN: torch.Tensor, rows: Sequence[tuple[int, int]], tiles: Tiles
) -> list[torch.Tensor]:
    """Return leftᵀ right of each expert's rows, fp32 [M, N]."""
    height, columns = left_RM.shape[1], right_RN.shape[1]
    if choose_part("expert_mlp", "wgrad", left_RM.device, left_RM.dtype, rows=len(left_RM)) == "segmented":
        return [_product_in_fp32(left_RM[start:stop].t(), right_RN[start:stop]) for start, stop in rows]
    pieces = count_pieces(rows, tiles.chunk)
    partial = torch.empty(sum(pieces), height, columns, dtype=torch.float32, device=left_RM.device)
    m, n, depth = tiles.wgrad
    weight_gradient_kernel[(triton.cdiv(height, m) * triton.cdiv(columns, n), sum(pieces))](
        left_RM,
        right_RN,
        upload_stops(rows, left_RM.device),
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
    return sum_per_expert(partial, pieces)


def _precision(dtype: torch.dtype) -> str:
    # TF32, the default for fp32, keeps 10 bits.
    return "ieee" if dtype == torch.float32 else "tf32"


def _product_in_fp32(left_MR: torch.Tensor, right_RN: torch.Tensor) -> torch.Tensor:
    """Return the product, fp32 [M, N], without rounding it on the way."""
    if left_MR.dtype == torch.float32:
        return left_MR @ right_RN
    if left_MR.device.type == "cuda":
        return torch.mm(left_MR, right_RN, out_dtype=torch.float32)
    return left_MR.float() @ right_RN.float()
