"""Where a student's weights come from: random, a Hugging Face encoder, a converted checkpoint, or an export of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from mmd2v.config.schema import EncoderConfig, InitConfig, LayerConfig, ModelConfig
from mmd2v.errors import UserError, unknown_name
from mmd2v.models.checkpoints.converted import FAMILIES, Architecture, block, encoder_state, read_architecture
from mmd2v.models.hf_backbone import bert_block, load_model
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
    """Fill the layers whose group names a source in ``init``. Raises UserError naming the group on any mismatch."""
    position = 0
    reader = BlockReader(config)
    for i, group in enumerate(config.layers):
        for owner in group.init:
            for init in group.inits_of(owner):
                where = f"model.layers.{i}.init.{owner}.source"
                for k in range(group.count):
                    block = reader.read(init, init.first + k * init.step, owner, group, where)
                    _fill(layers[position + k], owner, block, init.parts, where)
        position += group.count


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


def init_everything(student: nn.Module, source: str) -> None:
    """Fill the whole student from ``source``, the config's ``model.init``.

    Raises UserError when one of its weights, but for the projection's, is not in the export.
    """
    where = "model.init"
    kind, _, path = source.partition(":")
    if kind != "mmd2v":
        raise unknown_name(where, kind, ["mmd2v"])
    from mmd2v.models.exported import exported_state

    found = exported_state(path, where)
    for name, value in student.state_dict().items():
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


def _fill(layer: nn.Module, owner: str, block: dict[str, torch.Tensor], parts: str, where: str) -> None:
    """Copy a source block into the halves of ``layer`` that ``owner`` owns."""
    assert isinstance(layer, Layer)
    chosen = ("attention", "mlp") if parts == "both" else (parts,)
    halves = [half for half in chosen if owner in getattr(layer, half)]
    if not halves:
        raise UserError(
            f"{where}: '{owner}' owns no weights of {' and '.join(chosen)} in this layer (owners: "
            f"{', '.join(sorted({*layer.attention, *layer.mlp}))})"
        )
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


class BlockReader:
    """Reads blocks in our names, ``attention.qkv.weight`` … ``mlp.fc2.bias``; a library's model is loaded once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._models: dict[str, nn.Module] = {}

    def read(self, init: InitConfig, index: int, owner: str, group: LayerConfig, where: str) -> dict[str, torch.Tensor]:
        """Return block ``index`` of a source as ``owner`` takes it over."""
        kind, _, path = self.config.sources.get(init.source, init.source).partition(":")
        if kind == "hf":
            if path not in self._models:
                self._models[path] = load_model(path, pretrained=True, where=where)
            return bert_block(self._models[path], index, where)
        if kind == "mmd2v":
            from mmd2v.models.exported import exported_block

            return exported_block(path, index, init.modality or owner, where)
        if kind in FAMILIES:
            self._check(read_architecture(path, kind, where), kind, group, where)
            return block(path, kind, index, where)
        if not path:
            raise UserError(
                f"{where}: found '{init.source}', expected {':FOLDER, '.join(('hf', 'mmd2v', *FAMILIES))}:FOLDER a "
                f"name in model.sources ({', '.join(sorted(self.config.sources)) or 'which is empty'})"
            )
        raise unknown_name(where, kind, ["hf", "mmd2v", *FAMILIES])

    def _check(self, source: Architecture, kind: str, group: LayerConfig, where: str) -> None:
        """Weights fit any number of heads and any place of the norms, and compute something else there."""
        heads = group.heads or self.config.heads
        if heads != source.heads:
            raise UserError(f"{where}: the source has {source.heads} heads, the student's layer {heads}")
        norm = "pre" if kind == "beit2" else "post"
        if group.norm != norm:
            raise UserError(f"{where}: the source is {norm}-norm, the student's layer has norm: {group.norm}")
