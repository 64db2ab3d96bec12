"""Where a student's weights come from: random, a Hugging Face encoder's blocks, or an export of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from mmd2v.config.schema import InitConfig, ModelConfig
from mmd2v.errors import UserError, unknown_name
from mmd2v.models.hf_backbone import bert_block, load_model
from mmd2v.models.layers import SHARED, Layer

BlockReader = Callable[[int], dict[str, torch.Tensor]]
"""Index of a source block → its weights, named ``attention.qkv.weight`` … ``mlp.fc2.bias``."""


def init_random(module: nn.Module, seed: int, prefix: str = "", deviation: float = 0.02) -> None:
    """Draw linear, convolution and embedding weights, CLS and positions from N(0, 0.02) cut at two deviations (BERT).

    Biases become zero. Every parameter has a generator of its own, keyed by ``seed`` and its name: adding or removing
    one part of a model leaves the starting weights of all others as they were.
    """
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding):
            _draw(child.weight, seed, f"{name}.weight", deviation)
            if getattr(child, "bias", None) is not None:
                nn.init.zeros_(child.bias)
        for own, parameter in child.named_parameters(recurse=False):
            if own in ("cls_token", "positions"):
                _draw(parameter, seed, f"{name}.{own}", deviation)


def _draw(parameter: torch.Tensor, seed: int, name: str, deviation: float) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = 2 * deviation
    nn.init.trunc_normal_(parameter, std=deviation, a=-bound, b=bound, generator=generator)


def init_from_sources(layers: nn.ModuleList, config: ModelConfig) -> None:
    """Fill the layers whose group names a source in ``init``. Raises UserError naming the group on any mismatch."""
    position = 0
    readers: dict[tuple[str, str], BlockReader] = {}
    models: dict[str, nn.Module] = {}
    for i, group in enumerate(config.layers):
        for owner, init in group.init.items():
            where = f"model.layers.{i}.init.{owner}.source"
            key = (init.source, init.modality or owner)
            if key not in readers:
                readers[key] = _reader(init, owner, models, where)
            for k in range(group.count):
                _fill(layers[position + k], owner, readers[key](init.first + k), where)
        position += group.count


def _fill(layer: nn.Module, owner: str, block: dict[str, torch.Tensor], where: str) -> None:
    """Copy a source block into the halves of ``layer`` that ``owner`` owns."""
    assert isinstance(layer, Layer)
    halves = [half for half in ("attention", "mlp") if owner in getattr(layer, half)]
    if not halves:
        raise UserError(f"{where}: '{owner}' owns no weights in this layer (its attention and MLP are {SHARED})")
    for half in halves:
        target = getattr(layer, half)[owner].state_dict()
        for name, value in target.items():
            source = block.get(f"{half}.{name}")
            if source is None:
                continue  # a layer scale the source does not have keeps its configured start
            if source.shape != value.shape:
                raise UserError(
                    f"{where}: {half}.{name} has shape {tuple(source.shape)}, the student needs {tuple(value.shape)}"
                )
            value.copy_(source)


def _reader(init: InitConfig, owner: str, models: dict[str, nn.Module], where: str) -> BlockReader:
    """Return what reads blocks of ``init.source``; ``models`` keeps each Hugging Face encoder loaded once."""
    kind, _, path = init.source.partition(":")
    if kind == "hf":
        if path not in models:
            models[path] = load_model(path, pretrained=True, where=where)
        return lambda index: bert_block(models[path], index, where)
    if kind == "mmd2v":
        from mmd2v.models.exported import exported_block

        return lambda index: exported_block(path, index, init.modality or owner, where)
    raise unknown_name(where, kind, ["hf", "mmd2v"])
