"""BEiT-2 checkpoints of unilm in the names of timm's ``Beit``, and its blocks in ours.

Shapes: D width, F hidden width of an MLP, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mmd2v.errors import UserError
from mmd2v.models.checkpoints.accounting import Wanted, count_blocks, payload_of, shape_of, take
from mmd2v.models.checkpoints.architecture import Architecture, Conversion

_EPS = 1e-6
_TABLE = "rel_pos_bias.relative_position_bias_table"
_INDEX = "rel_pos_bias.relative_position_index"
_CLS_DISTANCES = 3  # rows of the table for CLS to token, token to CLS, CLS to itself
_IGNORED = ("cls_pt_layers.*", "lm_head.*", "mask_token", _INDEX)
"""The pretraining's own layers, and the index that timm computes itself."""


def is_beit2(payload: Mapping[str, Any]) -> bool:
    """Tell whether the keys are those of a BEiT: layer scale and a CLS, on patches."""
    return {"cls_token", "patch_embed.proj.weight", "blocks.0.gamma_1"} <= payload.keys()


def convert_beit2(content: Any, path: Path, heads: int | None = None) -> Conversion:
    """Return the checkpoint ``content`` of ``path`` in timm's names.

    Raises UserError for keys that do not belong to such a model, shapes that do not fit one another and ``heads`` other
    than those of its position table.
    """
    payload = payload_of(content, path)
    width, channels, patch, patch_width = shape_of(payload, "patch_embed.proj.weight", 4, path)
    if channels != 3 or patch != patch_width:
        raise UserError(
            f"{path}: 'patch_embed.proj.weight' is for {channels} channels and patches of {patch}x{patch_width}"
        )
    distances, own_heads = shape_of(payload, _TABLE, 2, path)
    side = (math.isqrt(max(distances - _CLS_DISTANCES, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + _CLS_DISTANCES != distances or side < 1:
        raise UserError(f"{path}: '{_TABLE}' has {distances} rows, expected (2 n - 1)^2 + {_CLS_DISTANCES}")
    if heads not in (None, own_heads) or width % own_heads:
        raise UserError(
            f"{path}: '{_TABLE}' is for {own_heads} heads, found --heads {heads or own_heads} and the width {width}"
        )
    _check_index(payload, side, path)
    depth = count_blocks(payload, "blocks.", path)
    hidden = shape_of(payload, "blocks.0.mlp.fc1.weight", 2, path)[0]
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        _TABLE: (distances, own_heads),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for index in range(depth):
        shapes.update(_block_shapes(index, width, hidden))
    state, left_out = take(payload, {key: Wanted(key, shape) for key, shape in shapes.items()}, _IGNORED, path)
    architecture = Architecture(
        width=width,
        depth=depth,
        heads=own_heads,
        eps=_EPS,
        mlp_ratio=hidden / width,
        image_size=side * patch,
        patch_size=patch,
    )
    return Conversion("beit2", architecture, state, left_out)


def beit2_block(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a block, given by timm's names without ``blocks.I.``, in our names; its keys have no bias."""
    bias_3D = torch.cat([state["attn.q_bias"], torch.zeros_like(state["attn.q_bias"]), state["attn.v_bias"]])
    return {
        "attention.norm.weight": state["norm1.weight"],
        "attention.norm.bias": state["norm1.bias"],
        "attention.qkv.weight": state["attn.qkv.weight"],
        "attention.qkv.bias": bias_3D,
        "attention.proj.weight": state["attn.proj.weight"],
        "attention.proj.bias": state["attn.proj.bias"],
        "attention.layer_scale": state["gamma_1"],
        "mlp.norm.weight": state["norm2.weight"],
        "mlp.norm.bias": state["norm2.bias"],
        "mlp.fc1.weight": state["mlp.fc1.weight"],
        "mlp.fc1.bias": state["mlp.fc1.bias"],
        "mlp.fc2.weight": state["mlp.fc2.weight"],
        "mlp.fc2.bias": state["mlp.fc2.bias"],
        "mlp.layer_scale": state["gamma_2"],
    }


def _block_shapes(index: int, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (
        *((name, (width,)) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.proj.bias")),
        *((name, (width,)) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias")),
        ("attn.qkv.weight", (3 * width, width)),
        ("attn.proj.weight", (width, width)),
        ("mlp.fc1.weight", (hidden, width)),
        ("mlp.fc1.bias", (hidden,)),
        ("mlp.fc2.weight", (width, hidden)),
    ):
        yield f"blocks.{index}.{name}", shape


def _check_index(payload: Mapping[str, Any], side: int, path: Path) -> None:
    from timm.models.beit import gen_relative_position_index  # slow to import, and most readers need no timm

    if _INDEX not in payload:
        return  # a buffer, which some leave out
    found, expected = payload[_INDEX], gen_relative_position_index((side, side))
    if not isinstance(found, torch.Tensor) or not torch.equal(found.to(expected.dtype), expected):
        raise UserError(f"{path}: '{_INDEX}' is not the index of {side}x{side} patches that its table has rows for")
