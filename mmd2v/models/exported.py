"""Reading the folders that ``mmd2v export`` writes: a whole student, or its layers as a source of blocks.

An export holds ``model.safetensors``, ``config.yaml`` (a run's config whose paths are relative to the folder), the
tokenizer's files and the configuration of each Hugging Face encoder: all that is needed, and no code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError
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


def exported_state(folder: str, where: str) -> dict[str, torch.Tensor]:
    """Return all weights of an export. Raises UserError, beginning with ``where``, when it is none or is damaged."""
    path = _file(folder, WEIGHTS_FILE, where)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{where}: {path} is no readable safetensors file: {error}") from error


def exported_block(folder: str, index: int, owner: str, where: str) -> dict[str, torch.Tensor]:
    """Return layer ``index`` of an export as ``owner`` (a modality or ``shared``) sees it, in our block names.

    Of a half that has a single owner its weights are taken, whoever asks: an image model's attention may become shared.
    Raises UserError when the layer has several owners and none is the one asked for, or is not there.
    """
    found = {}
    with safe_open(_file(folder, WEIGHTS_FILE, where), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"layers.{index}.")]  # noqa: SIM118
        for half in ("attention", "mlp"):
            prefix = f"layers.{index}.{half}."
            owners = sorted({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
            candidates = [one for one in (owner, SHARED) if one in owners] or (owners if len(owners) == 1 else [])
            if not candidates:
                has = f"owners {', '.join(owners)} of its {half}" if owners else f"no {half}"
                raise UserError(f"{where}: layer {index} of {folder} has {has}, and no weights of '{owner}'")
            own = f"{prefix}{candidates[0]}."
            found.update({f"{half}.{n.removeprefix(own)}": file.get_tensor(n) for n in names if n.startswith(own)})
    return found


def exported_encoder(folder: str, kind: str, where: str) -> dict[str, torch.Tensor]:
    """Return the state of the export's encoder of ``kind`` (``image``, ``text``). Raises UserError when it has none."""
    config = load_export_config(folder, where)
    names = [name for name, encoder in config.model.encoders.items() if encoder.input == kind]
    if not names:
        raise UserError(f"{where}: {folder} encodes {sorted(config.model.encoders)}, nothing of '{kind}'")
    prefix = f"encoders.{names[0]}."
    with safe_open(_file(folder, WEIGHTS_FILE, where), framework="pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118


def _file(folder: str | Path, name: str, where: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{where}: {folder} is no export: it has no {name} (written by `mmd2v export`)")
    return path
