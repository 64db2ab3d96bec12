"""data2vec 2.0 checkpoints of fairseq, image and text, pretrained and fine-tuned, in our names.

Shapes: D width, F hidden width of an MLP, P side of a patch, G patches of an image, V vocabulary, N positions.
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
from mmd2v.models.positions import sincos_2d

FINE_TUNED_PREFIX = "model."
_MODALITIES = {"image": "IMAGE", "text": "TEXT"}
_USUAL_EPS = {"image": 1e-6, "text": 1e-5}
_USUAL_HEAD_WIDTH = 64
_BLOCK = {
    "attn.qkv": "attention.{modality}.qkv",
    "attn.proj": "attention.{modality}.proj",
    "norm1": "attention.{modality}.norm",
    "mlp.fc1": "mlp.{modality}.fc1",
    "mlp.fc2": "mlp.{modality}.fc2",
    "norm2": "mlp.{modality}.norm",
}
"""Their part of a block → ours. Post-norm: norm1 follows the attention's residual, norm2 the MLP's."""
_PRETRAINING = ("_ema", "_ema.*", "shared_decoder.*", "recon_proj.*", "modality_encoders.*.decoder.*")
"""The teacher of the pretraining and what turned tokens into its targets."""
_HEADS = ("head.*", "fc_norm.*", "classification_heads.*")
"""What fairseq's fine-tuned models have beside ``model.``."""
_POSITION_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
_POSITION_ERROR_FP32 = 1e-4


def modality_of(payload: Mapping[str, Any]) -> str | None:
    """Return ``image`` or ``text`` if the keys are those of a data2vec 2.0 model of one of them."""
    for modality, theirs in _MODALITIES.items():
        start = f"modality_encoders.{theirs}."
        if any(key.removeprefix(FINE_TUNED_PREFIX).startswith(start) for key in payload):
            return modality
    return None


def convert_data2vec2(content: Any, path: Path, heads: int | None = None) -> Conversion:
    """Return the checkpoint ``content`` of ``path`` in our names.

    ``heads`` replaces what its config says. Raises UserError for keys that do not belong to such a model, shapes that
    do not fit one another, positions that are not the fixed ones and a number of heads that cannot be.
    """
    payload = payload_of(content, path)
    modality = modality_of(payload)
    assert modality is not None  # the caller has looked
    fine_tuned = any(key.startswith(f"{FINE_TUNED_PREFIX}modality_encoders.") for key in payload)
    prefix = FINE_TUNED_PREFIX if fine_tuned else ""
    encoder = f"{prefix}modality_encoders.{_MODALITIES[modality]}."
    ignored = tuple(prefix + pattern for pattern in _PRETRAINING) + (_HEADS if fine_tuned else ())
    if modality == "image":
        width, wanted, sizes = _image_encoder(payload, encoder, path)
        ignored += (f"{encoder}fixed_positional_encoder.positions",)  # computed again, and compared above
    else:
        width, wanted, sizes = _text_encoder(payload, encoder, path)
    # Blocks that a modality owns run first, after its norm.
    sources = [
        f"{start}{index}"
        for start in (f"{encoder}context_encoder.blocks.", f"{prefix}blocks.")
        for index in range(count_blocks(payload, start, path))
    ]
    if not sources:
        raise UserError(f"{path}: no key begins with '{prefix}blocks.0.', expected the blocks of a transformer")
    hidden = shape_of(payload, f"{sources[0]}.mlp.fc1.weight", 2, path)[0]
    for index, source in enumerate(sources):
        wanted.update(_block(source, index, modality, width, hidden))
    state, left_out = take(payload, wanted, ignored, path)
    config = _model_config(content)
    if config.get("layer_norm_first"):
        raise UserError(f"{path}: its config has layer_norm_first, expected a post-norm model as the published ones")
    eps = config.get("norm_eps")
    architecture = Architecture(
        width=width,
        depth=len(sources),
        heads=_heads(heads, config, width, path),
        eps=eps if isinstance(eps, float) and 0 < eps < 1 else _USUAL_EPS[modality],
        mlp_ratio=hidden / width,
        **sizes,
    )
    return Conversion(f"data2vec2-{modality}", architecture, state, left_out)


_Part = tuple[int, dict[str, Wanted], dict[str, int]]
"""D, their keys → our tensors, sizes that only this modality has."""


def _image_encoder(payload: Mapping[str, Any], encoder: str, path: Path) -> _Part:
    projection = f"{encoder}local_encoder.proj."
    width, channels, patch, patch_width = shape_of(payload, f"{projection}weight", 4, path)
    if channels != 3 or patch != patch_width:
        raise UserError(f"{path}: '{projection}weight' is for {channels} channels and patches of {patch}x{patch_width}")
    key = f"{encoder}fixed_positional_encoder.positions"
    _, patches, _ = shape_of(payload, key, 3, path)
    side = math.isqrt(patches)
    _check_positions(payload[key], key, side, width, path)
    wanted = {
        f"{projection}weight": Wanted("encoders.image.proj.weight", (width, 3, patch, patch)),
        f"{projection}bias": Wanted("encoders.image.proj.bias", (width,)),
        f"{encoder}extra_tokens": Wanted("encoders.image.grid.cls_token", (1, 1, width)),
        f"{encoder}context_encoder.norm.weight": Wanted("encoders.image.grid.norm.weight", (width,)),
        f"{encoder}context_encoder.norm.bias": Wanted("encoders.image.grid.norm.bias", (width,)),
    }
    return width, wanted, {"image_size": side * patch, "patch_size": patch}


def _check_positions(positions_1GD: torch.Tensor, key: str, side: int, width: int, path: Path) -> None:
    """The table is not stored again: our encoder computes it."""
    expected = (1, side * side, width)
    if tuple(positions_1GD.shape) != expected or width % 4:
        raise UserError(
            f"{path}: '{key}' has shape {tuple(positions_1GD.shape)}, expected {expected} of a square image"
        )
    distance = (positions_1GD[0].float() - sincos_2d((side, side), width)).abs().max().item()
    if not distance <= _POSITION_ERROR.get(positions_1GD.dtype, _POSITION_ERROR_FP32):
        raise UserError(
            f"{path}: '{key}' is up to {distance:.3g} off the fixed 2-D sine-cosine positions it should hold"
        )


def _text_encoder(payload: Mapping[str, Any], encoder: str, path: Path) -> _Part:
    local = f"{encoder}local_encoder."
    vocabulary, width = shape_of(payload, f"{local}embed_tokens.weight", 2, path)
    positions, _ = shape_of(payload, f"{local}embed_positions.weight", 2, path)
    wanted = {
        f"{local}embed_tokens.weight": Wanted("encoders.text.embedding.weight", (vocabulary, width)),
        f"{local}embed_positions.weight": Wanted("encoders.text.positions.weight", (positions, width)),
        f"{local}layernorm_embedding.weight": Wanted("encoders.text.norm.weight", (width,)),
        f"{local}layernorm_embedding.bias": Wanted("encoders.text.norm.bias", (width,)),
    }
    return width, wanted, {"vocab_size": vocabulary, "positions": positions}


def _block(source: str, index: int, modality: str, width: int, hidden: int) -> Iterator[tuple[str, Wanted]]:
    sizes = {"attn.qkv": (3 * width, width), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for theirs, ours in _BLOCK.items():
        name = f"layers.{index}.{ours.format(modality=modality)}"
        rows, columns = sizes.get(theirs, (width, width))
        weight = (width,) if theirs.startswith("norm") else (rows, columns)
        yield f"{source}.{theirs}.weight", Wanted(f"{name}.weight", weight)
        yield f"{source}.{theirs}.bias", Wanted(f"{name}.bias", weight[:1])


def _model_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the file's config that has the number of heads; empty when there is none.

    A fine-tuned file holds the whole config of its pretraining inside the model's.
    """
    candidates: list[Any] = [content.get("cfg"), content.get("args")]
    while candidates:
        candidate = candidates.pop(0)
        if isinstance(candidate, dict):
            heads = candidate.get("num_heads")
            if isinstance(heads, int) and heads > 0:
                return candidate
            candidates += [candidate.get("model"), candidate.get("pretrained_model_args")]
    return {}


def _heads(given: int | None, config: Mapping[str, Any], width: int, path: Path) -> int:
    heads = given or config.get("num_heads")
    if heads is None:
        if width % _USUAL_HEAD_WIDTH:
            raise UserError(
                f"{path}: no config in it says how many heads it has, and its width {width} is no multiple of "
                f"{_USUAL_HEAD_WIDTH}; give --heads"
            )
        heads = width // _USUAL_HEAD_WIDTH
    if heads < 1 or width % heads:
        source = "--heads" if given else "its config"
        raise UserError(f"{path}: {source} says {heads} heads, which do not divide its width {width}")
    return heads
