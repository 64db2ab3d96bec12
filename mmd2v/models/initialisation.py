"""Where a student's weights come from: random, a Hugging Face encoder, a converted checkpoint, or an export of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from mmd2v.config.schema import EncoderConfig, LayerConfig, ModelConfig
from mmd2v.config.structure import differences, function
from mmd2v.errors import UserError, unknown_name
from mmd2v.models.block_sources import Block, BlockReader
from mmd2v.models.checkpoints.converted import encoder_state, read_architecture
from mmd2v.models.layers import Layer


def init_random(module: nn.Module, seed: int, prefix: str = "", deviation: float = 0.02) -> None:
    """Draw linear, convolution and embedding weights, CLS and positions from N(0, 0.02) cut at two deviations (BERT).

    Biases become zero. Every parameter has a generator of its own, keyed by ``seed`` and its name: adding or removing
    one part of a model leaves the starting weights of all others as they were.
    """
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
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
    """Fill the layers whose group names a source in ``init``.

    Raises UserError naming the key unless the source's shapes, heads, place of the norms and epsilon are the layer's,
    and each of its weights has a place there.
    """
    position = 0
    reader = BlockReader(config)
    for i, group in enumerate(config.layers):
        for owner in group.init:
            for k in range(group.count):
                _init_owner(layers[position + k], owner, k, group, reader, f"model.layers.{i}", config.heads)
        position += group.count


def _init_owner(
    layer: nn.Module, owner: str, k: int, group: LayerConfig, reader: BlockReader, at: str, model_heads: int
) -> None:
    """Fill what ``owner`` owns of a group's layer ``k``."""
    assert isinstance(layer, Layer)
    found: dict[float, str] = {}
    inits = group.inits_of(owner)
    for j, init in enumerate(inits):
        where = f"{at}.init.{owner}.{j}.source" if len(inits) > 1 else f"{at}.init.{owner}.source"
        halves = _halves(layer, owner, init.parts, where)
        block = reader.read(init, init.first + k * init.step, owner, halves, where)
        for half in halves:
            _fill(getattr(layer, half)[owner], half, block, at, where)
            found[block.eps[half]] = init.source
        heads = group.heads or model_heads
        if heads != block.heads:
            raise UserError(f"{where}: the source has {block.heads} heads, the student's layer {heads}; set {at}.heads")
        if group.norm != block.norm:
            raise UserError(
                f"{where}: the source is {block.norm}-norm, the student's layer has norm: {group.norm}; set {at}.norm"
            )
    # One number serves both halves: where they come from sources of two, it is either's.
    eps = group.eps_of(owner)
    if eps not in found:
        sources = " and ".join(f"{value:g} ({source})" for value, source in found.items())
        raise UserError(f"{at}.eps: found {eps:g} for '{owner}', whose blocks were trained with {sources}")


def init_encoders(encoders: nn.ModuleDict, config: ModelConfig) -> None:
    """Fill the encoders that name a source of all their parts. Raises UserError on any mismatch."""
    for name, encoder_config in config.encoders.items():
        key, source = "init", encoder_config.init
        if source is None and encoder_config.kind in ("patch", "tokens"):
            key, source = "weights", getattr(encoder_config, "weights", None)
        if source is not None:
            where = f"model.encoders.{name}.{key}"
            source = config.sources.get(source, source)
            _fill_encoder(encoders[name], _encoder_state(source, encoder_config, where), source, where)


def init_everything(student: nn.Module, config: ModelConfig) -> None:
    """Fill the whole student, but for a projection of another form, from the export that ``config.init`` names.

    Raises UserError when the export's weights are not the student's, or are meant for another architecture.
    """
    where = "model.init"
    kind, _, path = (config.init or "").partition(":")
    if kind != "mmd2v":
        raise unknown_name(where, kind, ["mmd2v"])
    from mmd2v.models.exported import exported_state, load_export_config

    lines = differences("model", function(load_export_config(path, where).model), function(config), "export")
    if lines:
        raise UserError(f"{where}: {path} is of another architecture than this config:\n  " + "\n  ".join(lines))
    found = exported_state(path, where)
    own = student.state_dict()
    more = [name for name in found.keys() - own.keys() if not name.startswith("projection.")]
    if more:
        raise UserError(f"{where}: {path} has {_some(more)}, of which the student has nothing")
    for name, value in own.items():
        fits = name in found and found[name].shape == value.shape
        if fits:
            value.copy_(found[name])
        elif not name.startswith("projection."):
            seen = tuple(found[name].shape) if name in found else "nothing"
            raise UserError(f"{where}: {path} has {seen} for {name}, the student needs {tuple(value.shape)}")


def _fill_encoder(encoder: nn.Module, state: dict[str, torch.Tensor], source: str, where: str) -> None:
    own = encoder.state_dict()
    if own.keys() != state.keys():
        raise UserError(
            f"{where}: {source} has {_some(state.keys() - own.keys())} more and lacks "
            f"{_some(own.keys() - state.keys())}; set the encoder's kind, norm, cls and positions as the source's"
        )
    for name, value in own.items():
        found = state[name]
        if name == "positions.weight":
            found = found[: len(value)]  # a student of shorter texts needs the first positions only
        if found.shape != value.shape:
            raise UserError(f"{where}: {name} has shape {tuple(found.shape)}, the student needs {tuple(value.shape)}")
        value.copy_(found)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "") if names else "nothing"


def _encoder_state(source: str, config: EncoderConfig, where: str) -> dict[str, torch.Tensor]:
    kind, _, path = source.partition(":")
    if kind == "mmd2v":
        from mmd2v.models.exported import exported_encoder

        return exported_encoder(path, config.input, where)
    if kind not in ("data2vec2-image", "data2vec2-text"):
        raise unknown_name(where, kind, ["mmd2v", "data2vec2-image", "data2vec2-text"])
    architecture = read_architecture(path, kind, where)
    if config.norm_eps != architecture.eps:
        raise UserError(
            f"{where.rpartition('.')[0]}.norm_eps: found {config.norm_eps:g}, {path} was trained with "
            f"{architecture.eps:g}"
        )
    return encoder_state(path, kind, where)


def _halves(layer: Layer, owner: str, parts: str, where: str) -> list[str]:
    """Return which of ``attention`` and ``mlp`` are chosen and ``owner``'s."""
    chosen = ("attention", "mlp") if parts == "both" else (parts,)
    halves = [half for half in chosen if owner in getattr(layer, half)]
    if not halves:
        owners = sorted({*layer.attention, *layer.mlp})
        raise UserError(
            f"{where}: '{owner}' owns no weights of {' and '.join(chosen)} in this layer (owners: {', '.join(owners)})"
        )
    return halves


_OPTIONAL = {"layer_scale": "layer_scale", "inner_norm": "sub_norm"}
"""Part of a half that not every block has → the key that gives it to a layer."""


def _fill(target: nn.Module, half: str, block: Block, at: str, where: str) -> None:
    """Copy one half of a source block into an owner's weights of that half."""
    own = target.state_dict()
    source = {
        name.removeprefix(f"{half}."): value for name, value in block.weights.items() if name.startswith(f"{half}.")
    }
    for name in sorted(source.keys() - own.keys()):
        key = _OPTIONAL.get(name.partition(".")[0])
        advice = f"; set {at}.{key}" if key else ""
        raise UserError(f"{where}: the source has {half}.{name}, for which the student's layer has no place{advice}")
    for name, value in own.items():
        if name not in source:
            if name.partition(".")[0] in _OPTIONAL:
                continue  # it keeps its configured start
            raise UserError(f"{where}: the source has no {half}.{name}")
        if source[name].shape != value.shape:
            raise UserError(
                f"{where}: {half}.{name} has shape {tuple(source[name].shape)}, the student needs {tuple(value.shape)}"
            )
        value.copy_(source[name])
