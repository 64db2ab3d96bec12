"""Which teacher a config means, found without loading it: what decides its outputs, and nothing about folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.annotation_settings import digest
from mmd2v.errors import UserError
from mmd2v.models.checkpoints import converted
from mmd2v.models.teachers.base import teacher_dtype

_HF_SETTINGS = ("config.json", "preprocessor_config.json")


def teacher_settings(config: TeacherConfig, device: torch.device, where: str) -> dict[str, Any]:
    """Setting → value, of all that decides the teacher's outputs for an input.

    Weights in files here count by the files' contents; without any (timm's or the hub's own) the name stands for them.
    The precision is the one that ``device`` gives.

    Raises:
        UserError: there is nothing at the path that the config names; starts with ``where``.
    """
    kind, _, rest = config.name.partition(":")
    model, _, weights = rest.partition("@")
    name, files = config.name, []
    if kind == "timm" and weights:
        name, path = f"timm:{model}", Path(weights)
        files = [path / "model.safetensors" if path.is_dir() else path]
    elif kind == "mmd2v":
        name, folder = kind, Path(rest)
        # Its encoders' own configurations are in there too, but no file of the folder that people may add.
        files = [folder / "model.safetensors", folder / "config.yaml", *sorted(folder.glob("encoders/*/config.json"))]
    elif kind in converted.FAMILIES:
        name, folder = kind, Path(rest)
        files = [folder / converted.WEIGHTS_FILE, folder / converted.CONFIG_FILE]
    elif kind == "hf" and Path(rest).is_dir():
        name, folder = kind, Path(rest)
        found = [folder / file for file in _HF_SETTINGS if (folder / file).is_file()]
        files = [*found, *sorted(folder.glob("*.safetensors"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{where}: no file {missing[0]}")
    return {
        "the teacher's name": name,
        "the teacher's weights (sha256 of their files)": digest(files) if files else None,
        "the teacher's kwargs": config.kwargs,
        "the teacher's modality": config.modality,
        "the teacher's image_size": config.image_size,
        "the teacher's mean": None if config.mean is None else list(config.mean),
        "the teacher's std": None if config.std is None else list(config.std),
        "the teacher's pooling": config.pooling if kind == "hf" else None,
        "the teacher's precision": str(teacher_dtype(config.precision, device)).removeprefix("torch."),
    }
