"""Reading the folders that ``mmd2v convert`` writes: a public checkpoint's weights in our names and its sizes.

A folder holds ``model.safetensors`` (fp32), ``config.json`` and a ``README.md`` for people.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from mmd2v.errors import UserError, nearest
from mmd2v.models.checkpoints.architecture import FAMILIES, Architecture
from mmd2v.models.checkpoints.beit2 import beit2_block

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

__all__ = ["FAMILIES", "Architecture", "block", "encoder_state", "load_state", "read_architecture"]


class Source(BaseModel):
    """The file a folder was made of."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str


class Ignored(BaseModel):
    """Keys of that file that were left out on purpose."""

    model_config = ConfigDict(extra="forbid")

    keys: str
    count: int


class ConvertedConfig(BaseModel):
    """What ``config.json`` holds."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["mmd2v-converted"] = "mmd2v-converted"
    version: Literal[1] = 1
    family: Literal["data2vec2-image", "data2vec2-text", "beit2"]
    architecture: Architecture
    source: Source
    ignored: list[Ignored]


def read_architecture(folder: str | Path, family: str, where: str) -> Architecture:
    """Return the sizes of a converted checkpoint.

    Raises UserError, beginning with ``where``, for a folder that is none, is damaged or is of another family.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if folder.is_file():
        raise UserError(f"{where}: {folder} is a file; run `mmd2v convert {folder} --out DIR` and name that folder")
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"{where}: no folder {folder}, expected one that `mmd2v convert` wrote.{nearest(folder.name, siblings)}"
        )
    if not path.is_file():
        raise UserError(f"{where}: {folder} has no {CONFIG_FILE}, expected a folder that `mmd2v convert` wrote")
    try:
        config = ConvertedConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{where}: {path} is not what `mmd2v convert` writes: {_first(error)}") from error
    if config.family != family:
        raise UserError(
            f"{where}: {folder} holds a {config.family} checkpoint, found the prefix '{family}:'. Did you mean "
            f"'{config.family}:{folder}'?"
        )
    return config.architecture


def load_state(folder: str | Path, family: str, where: str) -> dict[str, torch.Tensor]:
    """Return all weights: those of data2vec 2.0 in the names of our student, BEiT-2's in timm's.

    Raises UserError, beginning with ``where``, for a folder that is none, is damaged or is of another family.
    """
    read_architecture(folder, family, where)
    return _tensors(folder, "", where)


def block(folder: str | Path, family: str, index: int, where: str) -> dict[str, torch.Tensor]:
    """Return block ``index`` in our names, ``attention.qkv.weight`` … ``mlp.fc2.bias``.

    Raises UserError, beginning with ``where``, when there is no such block, and as :func:`load_state`.
    """
    depth = read_architecture(folder, family, where).depth
    if not 0 <= index < depth:
        raise UserError(f"{where}: block {index} of {folder}, which has the blocks 0 to {depth - 1}")
    if family == "beit2":
        return beit2_block(_tensors(folder, f"blocks.{index}.", where))
    modality = family.rpartition("-")[2]
    return {
        f"{half}.{name}": value
        for half in ("attention", "mlp")
        for name, value in _tensors(folder, f"layers.{index}.{half}.{modality}.", where).items()
    }


def encoder_state(folder: str | Path, family: str, where: str) -> dict[str, torch.Tensor]:
    """Return the weights of the modality encoder (what comes before the blocks) in the names of ours.

    Raises UserError, beginning with ``where``, for BEiT-2, whose positions are in its blocks, and as
    :func:`load_state`.
    """
    read_architecture(folder, family, where)
    if family == "beit2":
        raise UserError(f"{where}: {folder} is a beit2 checkpoint, which has no encoder of its own; expected data2vec2")
    return _tensors(folder, f"encoders.{family.rpartition('-')[2]}.", where)


def _tensors(folder: str | Path, prefix: str, where: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{where}: {folder} has no {WEIGHTS_FILE}, expected a folder that `mmd2v convert` wrote")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no dict
            found = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{where}: {path} is no readable safetensors file: {error}") from error
    if not found:
        raise UserError(f"{where}: {path} holds nothing named '{prefix}…'; it does not belong to its {CONFIG_FILE}")
    return found


def _first(error: ValidationError) -> str:
    problem: Any = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    return f"{key}: {problem['msg']}" if key else problem["msg"]
