"""Reading the folders that ``mmd2v export`` writes: a whole student, or its layers as a source of blocks.

An export holds ``model.safetensors``, ``config.yaml`` (a run's config whose paths are relative to the folder), the
tokenizer's files and the configuration of each Hugging Face encoder: all that is needed, and no code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.config.structure import each_layer
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError, nearest
from mmd2v.models.block_sources import Block
from mmd2v.models.layers import SHARED
from mmd2v.models.student import Student, build_student
from mmd2v.models.timm_backbone import load_exactly

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"


def load_student(folder: str | Path, where: str) -> Student:
    """Rebuild the exported student on the CPU in eval mode.

    Raises UserError, beginning with ``where``, for a folder that is no export or whose weights do not fit its config.
    """
    config = load_export_config(folder, where)
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    student = build_student(config, tokenizer, pretrained=False)
    what = f"{where}: the weights in {folder} do not fit its {CONFIG_FILE}"
    load_exactly(student, exported_state(folder, where), what)
    return student.eval()


def load_export_config(folder: str | Path, where: str) -> Config:
    """Return the config of an export with its relative paths made absolute."""
    config = load_config(_file(folder, CONFIG_FILE, where))
    folder = Path(folder).resolve()
    data, model = config.data, config.model
    if data.tokenizer is not None:
        path = str(folder / data.tokenizer.path)
        data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"path": path})})
    encoders = {
        name: encoder.model_copy(update={"name": str(folder / encoder.name)}) if encoder.kind == "hf" else encoder
        for name, encoder in model.encoders.items()
    }
    return config.model_copy(update={"data": data, "model": model.model_copy(update={"encoders": encoders})})


def exported_state(folder: str | Path, where: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights of an export whose names begin with ``prefix``, without it.

    Raises UserError, beginning with ``where``, when it is none or is damaged.
    """
    path = _file(folder, WEIGHTS_FILE, where)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no dict
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{where}: {path} is no readable safetensors file: {error}") from error


def exported_block(
    folder: str, index: int, owner: str, halves: Iterable[str], where: str, *, anyone: bool = False
) -> Block:
    """Return ``halves`` (``attention``, ``mlp``) of layer ``index`` of an export as ``owner`` sees them.

    ``owner`` is a modality, ``shared`` or ``joint``. ``anyone`` takes the weights of a half's single owner where it has
    none of ``owner``. Raises UserError naming the owners when the layer has no weights for it, or is not there.
    """
    model = load_export_config(folder, where).model
    layers = each_layer(model)
    if index >= len(layers):
        raise UserError(f"{where}: layer {index} of {folder}, which has {len(layers)}, counted from 0")
    layer = layers[index]
    state = exported_state(folder, where, f"layers.{index}.")
    weights, eps = {}, {}
    for half in halves:
        owners = sorted({name.split(".")[1] for name in state if name.startswith(f"{half}.")})
        candidates = [one for one in (owner, SHARED) if one in owners] or (
            owners if anyone and len(owners) == 1 else []
        )
        if not candidates:
            raise UserError(
                f"{where}: layer {index} of {folder} has no {half} of '{owner}', expected one of its owners "
                f"({', '.join(owners) or 'none'}) as `modality`.{nearest(owner, owners)}"
            )
        own = f"{half}.{candidates[0]}."
        weights |= {f"{half}.{n.removeprefix(own)}": value for n, value in state.items() if n.startswith(own)}
        eps[half] = layer.eps_of(candidates[0])
    return Block(weights, layer.heads or model.heads, layer.norm, eps)


def exported_encoder(folder: str, kind: str, where: str) -> dict[str, torch.Tensor]:
    """Return the state of the export's encoder of ``kind`` (``image``, ``text``). Raises UserError when it has none."""
    config = load_export_config(folder, where)
    names = [name for name, encoder in config.model.encoders.items() if encoder.input == kind]
    if not names:
        raise UserError(f"{where}: {folder} encodes {sorted(config.model.encoders)}, nothing of '{kind}'")
    return exported_state(folder, where, f"encoders.{names[0]}.")


def _file(folder: str | Path, name: str, where: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{where}: {folder} is no export: it has no {name} (written by `mmd2v export`)")
    return path
