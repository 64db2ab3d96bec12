"""VLMo checkpoints of unilm that have the two projections of its contrastive loss, in the names of our layers.

Shapes: D width, F hidden width of an MLP, H heads, P side of a patch, V vocabulary, R rows of the position table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmd2v.errors import UserError
from mmd2v.models.checkpoints.accounting import Wanted, count_blocks, shape_of, take
from mmd2v.models.checkpoints.beit3 import heads_of
from mmd2v.models.checkpoints.inert import shown

TABLE = "relative_position_bias_table"
CLS_DISTANCES = 3
"""Rows of a modality's distances for the CLS: to a token, from a token, to itself."""
BETWEEN = 2
"""Rows for text to image and image to text, after the image's."""
USUAL_TEXT_DISTANCES = 196
"""Longest text, in tokens, of the published models' text pretraining, for whose distances the table has rows."""

_PATCHES = "transformer.patch_embed.proj.weight"
_TOP = ("state_dict", "module", "model")
_PROJECTIONS = {"image": "itc_image_proj.fc.weight", "text": "itc_text_proj.fc.weight"}
_EXPERTS = {"image": "imag", "text": "text"}
_IGNORED = (
    "pooler.*",
    "mlm_score.*",
    "itm_score.*",
    "itc_vl_*",
    "logit_scale",
    "logit_vl_scale",
    "text_embeddings.position_ids",
    "*relative_position_index",
    "transformer.blocks.*.mlp_vl.*",
    "transformer.blocks.*.norm2_vl.*",
)
"""Parts of its other losses, and indices that are computed."""


@dataclass(frozen=True)
class VLMoCheckpoint:
    """A model that embeds images and texts: its sizes and weights."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    image_size: int
    patch_size: int
    vocab_size: int
    max_length: int
    """Longest text, in tokens."""
    relative: bool
    """Positions are biases of the attention, not vectors added to the tokens."""
    text_distances: int
    """Longest text the table of biases has distances for; 0 where there is none."""
    layer_scale: bool
    state: dict[str, torch.Tensor]


def is_vlmo(payload: Mapping[str, Any]) -> bool:
    """Tell whether the keys are those of a VLMo."""
    return {_PATCHES, "text_embeddings.word_embeddings.weight"} <= payload.keys()


def read_vlmo(content: Any, path: Path, *, heads: int | None = None, image_size: int | None = None) -> VLMoCheckpoint:
    """Return the checkpoint ``content`` of ``path``.

    The table of relative positions tells the number of ``heads``; the other models need 64 channels a head or to be
    told. ``image_size`` is needed where the table was made for longer texts than the published models'. Raises
    UserError for keys that do not belong to such a model, shapes that do not fit one another, and a model without the
    projections of the contrastive loss.
    """
    payload = _payload(content, path)
    missing = [key for key in _PROJECTIONS.values() if key not in payload]
    if missing:
        raise UserError(
            f"{path}: found no {' and no '.join(missing)}, expected a VLMo with an embedding space: one fine-tuned for "
            "retrieval (…_coco.pt, …_f30k.pt) or pretrained with the contrastive loss"
        )
    width, channels, patch, patch_width = shape_of(payload, _PATCHES, 4, path)
    if channels != 3 or patch != patch_width:
        raise UserError(f"{path}: '{_PATCHES}' is for {channels} channels and patches of {patch}x{patch_width}")
    depth = count_blocks(payload, "transformer.blocks.", path)
    if depth == 0:
        raise UserError(f"{path}: no key begins with 'transformer.blocks.0.', expected the blocks of a transformer")
    relative = TABLE in payload
    distances = 0
    if relative:
        rows, columns = shape_of(payload, TABLE, 2, path)
        if columns % depth or width % (columns // depth):
            raise UserError(f"{path}: '{TABLE}' has {columns} columns, which are no heads of {depth} blocks of {width}")
        if heads not in (None, columns // depth):
            raise UserError(f"{path}: '{TABLE}' is for {columns // depth} heads, found heads={heads}")
        heads = columns // depth
        side, distances = _grid(rows, None if image_size is None else image_size / patch, path)
    else:
        heads = heads_of(heads, width, path)
        tokens = shape_of(payload, "transformer.pos_embed", 3, path)[1]
        side = math.isqrt(max(tokens - 1, 0))
        if side < 1 or side * side + 1 != tokens:
            raise UserError(f"{path}: 'transformer.pos_embed' has {tokens} rows, expected 1 + those of a square image")
    if image_size not in (None, side * patch):
        raise UserError(f"{path}: found image_size={image_size}, its positions are for {side * patch} px")
    vocabulary = shape_of(payload, "text_embeddings.word_embeddings.weight", 2, path)[0]
    max_length = shape_of(payload, "text_embeddings.position_embeddings.weight", 2, path)[0]
    if relative and max_length > distances:
        raise UserError(f"{path}: its texts have up to {max_length} tokens, but '{TABLE}' distances for {distances}")
    hidden = shape_of(payload, "transformer.blocks.0.mlp_imag.fc1.weight", 2, path)[0]
    kinds = shape_of(payload, "token_type_embeddings.weight", 2, path)[0]
    text_kinds = shape_of(payload, "text_embeddings.token_type_embeddings.weight", 2, path)[0]
    layer_scale = "transformer.blocks.0.gamma_1" in payload
    wanted = {
        _PATCHES: Wanted("proj.weight", (width, 3, patch, patch)),
        "transformer.patch_embed.proj.bias": Wanted("proj.bias", (width,)),
        "transformer.cls_token": Wanted("cls_token", (1, 1, width)),
        "transformer.norm.weight": Wanted("norm.weight", (width,)),
        "transformer.norm.bias": Wanted("norm.bias", (width,)),
        "text_embeddings.word_embeddings.weight": Wanted("words.weight", (vocabulary, width)),
        "text_embeddings.position_embeddings.weight": Wanted("positions", (max_length, width)),
        "text_embeddings.token_type_embeddings.weight": Wanted("text_kinds", (text_kinds, width)),
        "text_embeddings.LayerNorm.weight": Wanted("text_norm.weight", (width,)),
        "text_embeddings.LayerNorm.bias": Wanted("text_norm.bias", (width,)),
        "token_type_embeddings.weight": Wanted("kinds", (kinds, width)),
        **{key: Wanted(f"heads.{name}.weight", (width, width)) for name, key in _PROJECTIONS.items()},
    }
    if relative:
        wanted[TABLE] = Wanted("table", shape_of(payload, TABLE, 2, path))
    else:
        wanted["transformer.pos_embed"] = Wanted("image_positions", (1, side * side + 1, width))
    for index in range(depth):
        wanted.update(_block(index, width, hidden, layer_scale))
    state, _ = take(payload, wanted, _IGNORED, path)
    _simplify(state, depth, heads, layer_scale)
    return VLMoCheckpoint(
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=hidden / width,
        image_size=side * patch,
        patch_size=patch,
        vocab_size=vocabulary,
        max_length=max_length,
        relative=relative,
        text_distances=distances,
        layer_scale=layer_scale,
        state=state,
    )


def _payload(content: Any, path: Path) -> dict[str, Any]:
    """Return the weights, which lie under one of several keys or bare, without the engine's prefix."""
    found = content if isinstance(content, dict) else {}
    for key in _TOP:
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    payload = {key.removeprefix("module."): value for key, value in found.items() if isinstance(key, str)}
    if not is_vlmo(payload):
        names = ", ".join(shown(key) for key in sorted(payload)[:3]) or type(content).__name__
        raise UserError(
            f"{path}: its keys ({names} …) are not a VLMo's, expected keys as {_PATCHES} and "
            "text_embeddings.word_embeddings.weight, bare or under state_dict, module or model"
        )
    return payload


def _grid(rows: int, side: float | None, path: Path) -> tuple[int, int]:
    """Return patches a side, and the longest text, of a table of so many rows."""
    if side is None:
        text = USUAL_TEXT_DISTANCES
        squares = rows - 2 * text - BETWEEN - CLS_DISTANCES
        whole = math.isqrt(max(squares, 0))
        if whole * whole != squares or whole % 2 == 0:
            raise UserError(
                f"{path}: '{TABLE}' has {rows} rows, expected (2 n - 1)^2 + {CLS_DISTANCES + BETWEEN} + "
                f"2 x {USUAL_TEXT_DISTANCES}; for a model of other texts add ,image_size=PIXELS"
            )
        return (whole + 1) // 2, text
    text, odd = divmod(rows - BETWEEN - CLS_DISTANCES - (2 * round(side) - 1) ** 2, 2)
    if side != round(side) or odd or text < 2:
        raise UserError(f"{path}: '{TABLE}' has {rows} rows, which image_size gives no whole number of distances")
    return round(side), text


def _block(index: int, width: int, hidden: int, layer_scale: bool) -> Iterator[tuple[str, Wanted]]:
    theirs, ours = f"transformer.blocks.{index}.", f"layers.{index}."
    yield f"{theirs}attn.qkv.weight", Wanted(f"{ours}attention.shared.qkv.weight", (3 * width, width))
    yield f"{theirs}attn.q_bias", Wanted(f"{ours}q_bias", (width,))
    yield f"{theirs}attn.v_bias", Wanted(f"{ours}v_bias", (width,))
    parts = {"norm1": ("attention.shared.norm", (width,)), "attn.proj": ("attention.shared.proj", (width, width))}
    for name, expert in _EXPERTS.items():
        parts[f"norm2_{expert}"] = (f"mlp.{name}.norm", (width,))
        parts[f"mlp_{expert}.fc1"] = (f"mlp.{name}.fc1", (hidden, width))
        parts[f"mlp_{expert}.fc2"] = (f"mlp.{name}.fc2", (width, hidden))
    for part, (name, shape) in parts.items():
        yield f"{theirs}{part}.weight", Wanted(f"{ours}{name}.weight", shape)
        yield f"{theirs}{part}.bias", Wanted(f"{ours}{name}.bias", shape[:1])
    if layer_scale:
        yield f"{theirs}gamma_1", Wanted(f"{ours}attention.shared.layer_scale", (width,))
        yield f"{theirs}gamma_2", Wanted(f"{ours}gamma_2", (width,))


def _simplify(state: dict[str, torch.Tensor], depth: int, heads: int, layer_scale: bool) -> None:
    """Give every layer its own: biases of q, k and v in one, the scale of each expert, its columns of the table."""
    table_RC = state.pop("table", None)
    for index in range(depth):
        ours = f"layers.{index}."
        query, value = state.pop(f"{ours}q_bias"), state.pop(f"{ours}v_bias")
        state[f"{ours}attention.shared.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        if layer_scale:
            scale = state.pop(f"{ours}gamma_2")
            for name in _EXPERTS:
                state[f"{ours}mlp.{name}.layer_scale"] = scale.clone()
        if table_RC is not None:
            state[f"{ours}bias_table"] = table_RC[:, index * heads : (index + 1) * heads].clone()
    # Constant in this use: the text's first kind, and its kind beside the image's.
    state["text_kind"] = state.pop("text_kinds")[0].clone()
    kinds = state.pop("kinds")
    state["kind.text"], state["kind.image"] = kinds[0].clone(), kinds[1].clone()
    if table_RC is not None:
        del state["positions"]  # in the file, and not used
