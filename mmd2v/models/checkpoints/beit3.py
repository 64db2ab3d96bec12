"""BEiT-3 checkpoints of unilm (torchscale's multiway encoder) that have retrieval's two heads, in our names.

Shapes: D width, F hidden width of an MLP, E width of an embedding, P side of a patch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmd2v.errors import UserError
from mmd2v.models.checkpoints.accounting import Wanted, count_blocks, payload_of, shape_of, take
from mmd2v.models.checkpoints.inert import shown

FIRST_POSITION = 2
"""torchscale counts positions as fairseq does."""
MODALITIES = {"A": "image", "B": "text"}
"""Its two ways → ours."""
_HEADS = {"image": "vision_head.weight", "text": "language_head.weight"}
_IGNORED = ("logit_scale", "beit3.vision_embed.mask_token")
_USUAL_HEAD_WIDTH = 64
_BLOCK = {
    "self_attn_layer_norm.{way}": "attention.{modality}.norm",
    "self_attn.q_proj.{way}": "attention.{modality}.q",
    "self_attn.k_proj.{way}": "attention.{modality}.k",
    "self_attn.v_proj.{way}": "attention.{modality}.v",
    "self_attn.inner_attn_ln.{way}": "attention.{modality}.inner_norm",
    "self_attn.out_proj.{way}": "attention.{modality}.proj",
    "final_layer_norm.{way}": "mlp.{modality}.norm",
    "ffn.{way}.fc1": "mlp.{modality}.fc1",
    "ffn.{way}.ffn_layernorm": "mlp.{modality}.inner_norm",
    "ffn.{way}.fc2": "mlp.{modality}.fc2",
}
"""Their part of a block → ours, in which q, k and v are one map in the end."""


@dataclass(frozen=True)
class BEiT3Checkpoint:
    """A retrieval checkpoint: its sizes, and weights in the names of a `Student` without projection."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    image_size: int
    patch_size: int
    vocab_size: int
    position_rows: int
    """Of the text's table, the first two included."""
    embedding_width: int
    state: dict[str, torch.Tensor]
    norms: dict[str, dict[str, torch.Tensor]]
    """Modality → weight and bias [D] of the norm after the last layer."""
    projections: dict[str, torch.Tensor]
    """Modality → [E, D]"""


def is_beit3(payload: Mapping[str, Any]) -> bool:
    """Tell whether the keys are those of a BEiT-3."""
    return any(key.startswith("beit3.") for key in payload)


def read_beit3(content: Any, path: Path, heads: int | None = None) -> BEiT3Checkpoint:
    """Return the checkpoint ``content`` of ``path``.

    ``heads`` are the attention heads, of which the file says nothing; None: 64 channels a head, as the published
    models have. Raises UserError for keys that do not belong to such a model, shapes that do not fit one another, a
    model without the heads of retrieval, and a number of attention heads that cannot be.
    """
    payload = payload_of(content, path)
    if not is_beit3(payload):
        names = ", ".join(shown(key) for key in sorted(payload)[:3])
        raise UserError(f"{path}: its keys ({names} …) are not a BEiT-3's, expected keys as beit3.text_embed.weight")
    if _HEADS["image"] not in payload or _HEADS["text"] not in payload:
        raise UserError(
            f"{path}: found no {_HEADS['image']} and {_HEADS['text']}, expected a BEiT-3 with an embedding space: one "
            "fine-tuned for retrieval (…_retrieval.pth) or of the contrastive stage (…_itc_….pth)"
        )
    projection = "beit3.vision_embed.proj.weight"
    width, channels, patch, patch_width = shape_of(payload, projection, 4, path)
    if channels != 3 or patch != patch_width:
        raise UserError(f"{path}: '{projection}' is for {channels} channels and patches of {patch}x{patch_width}")
    rows = shape_of(payload, "beit3.encoder.embed_positions.A.weight", 2, path)[0]
    patches = rows - FIRST_POSITION - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise UserError(
            f"{path}: 'beit3.encoder.embed_positions.A.weight' has {rows} rows, expected 3 + those of a square image"
        )
    position_rows = shape_of(payload, "beit3.encoder.embed_positions.B.weight", 2, path)[0]
    vocabulary = shape_of(payload, "beit3.text_embed.weight", 2, path)[0]
    embedding_width = shape_of(payload, _HEADS["image"], 2, path)[0]
    depth = count_blocks(payload, "beit3.encoder.layers.", path)
    if depth == 0:
        raise UserError(f"{path}: no key begins with 'beit3.encoder.layers.0.', expected the blocks of a transformer")
    hidden = shape_of(payload, "beit3.encoder.layers.0.ffn.A.fc1.weight", 2, path)[0]
    wanted = {
        projection: Wanted("encoders.image.proj.weight", (width, 3, patch, patch)),
        "beit3.vision_embed.proj.bias": Wanted("encoders.image.proj.bias", (width,)),
        "beit3.vision_embed.cls_token": Wanted("encoders.image.grid.cls_token", (1, 1, width)),
        "beit3.encoder.embed_positions.A.weight": Wanted("encoders.image.grid.positions", (rows, width)),
        "beit3.encoder.embed_positions.B.weight": Wanted("encoders.text.positions.weight", (position_rows, width)),
        "beit3.text_embed.weight": Wanted("encoders.text.embedding.weight", (vocabulary, width)),
        **{key: Wanted(f"head.{name}", (embedding_width, width)) for name, key in _HEADS.items()},
    }
    for way, modality in MODALITIES.items():
        for kind in ("weight", "bias"):
            wanted[f"beit3.encoder.layer_norm.{way}.{kind}"] = Wanted(f"norm.{modality}.{kind}", (width,))
    for index in range(depth):
        wanted.update(_block(index, width, hidden))
    state, _ = take(payload, wanted, _IGNORED, path)
    norms = {name: {k: state.pop(f"norm.{name}.{k}") for k in ("weight", "bias")} for name in MODALITIES.values()}
    projections = {name: state.pop(f"head.{name}") for name in MODALITIES.values()}
    state["encoders.image.grid.positions"] = state["encoders.image.grid.positions"][None, FIRST_POSITION:].clone()
    _join_qkv(state, depth)
    return BEiT3Checkpoint(
        width=width,
        depth=depth,
        heads=heads_of(heads, width, path),
        mlp_ratio=hidden / width,
        image_size=side * patch,
        patch_size=patch,
        vocab_size=vocabulary,
        position_rows=position_rows,
        embedding_width=embedding_width,
        state=state,
        norms=norms,
        projections=projections,
    )


def heads_of(given: int | None, width: int, path: Path) -> int:
    """Return the attention heads of a file that does not say: ``given``, or one every 64 channels.

    Raises UserError when they do not divide the width.
    """
    if given is None and width % _USUAL_HEAD_WIDTH:
        raise UserError(
            f"{path}: nothing in it says how many attention heads it has, and its width {width} is no multiple of "
            f"{_USUAL_HEAD_WIDTH}; add ,heads=NUMBER"
        )
    heads = given or width // _USUAL_HEAD_WIDTH
    if width % heads:
        raise UserError(f"{path}: found heads={heads}, which do not divide its width {width}")
    return heads


def _block(index: int, width: int, hidden: int) -> Iterator[tuple[str, Wanted]]:
    weights = {"fc1": (hidden, width), "fc2": (width, hidden), "ffn_layernorm": (hidden,)}
    for theirs, ours in _BLOCK.items():
        part = theirs.rpartition(".")[2] if theirs.startswith("ffn.") else theirs
        shape = weights.get(part) or ((width,) if "norm" in part or "_ln" in part else (width, width))
        for way, modality in MODALITIES.items():
            key = f"beit3.encoder.layers.{index}.{theirs.format(way=way)}"
            name = f"layers.{index}.{ours.format(modality=modality)}"
            yield f"{key}.weight", Wanted(f"{name}.weight", shape)
            yield f"{key}.bias", Wanted(f"{name}.bias", shape[:1])


def _join_qkv(state: dict[str, torch.Tensor], depth: int) -> None:
    for index in range(depth):
        for modality in MODALITIES.values():
            start = f"layers.{index}.attention.{modality}."
            for kind in ("weight", "bias"):
                state[f"{start}qkv.{kind}"] = torch.cat([state.pop(f"{start}{part}.{kind}") for part in "qkv"])
