"""Converted checkpoints of any size, filled with zeros: what configs of the public sizes need to be built."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mmd2v.models.checkpoints.architecture import Architecture
from mmd2v.models.checkpoints.converted import CONFIG_FILE, WEIGHTS_FILE, ConvertedConfig, Source
from mmd2v.models.checkpoints.student import student_of
from mmd2v.models.teachers.beit2 import beit_of

BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0}
SIZES = {
    "data2vec2-image": BASE | {"eps": 1e-6, "image_size": 224, "patch_size": 16},
    "data2vec2-text": BASE | {"eps": 1e-5, "vocab_size": 50_265, "positions": 514},
    "beit2": BASE | {"eps": 1e-6, "image_size": 224, "patch_size": 16},
}


def converted_base(folder: Path, family: str) -> Path:
    """Write a folder as `mmd2v convert` makes it of the public file of ``family``, but for the values."""
    architecture = Architecture(**SIZES[family])
    with torch.device("meta"):
        model = beit_of(architecture) if family == "beit2" else student_of(family, architecture, "here")
    state = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS_FILE)
    config = ConvertedConfig(
        family=family, architecture=architecture, source=Source(file="zeros", sha256="0" * 64), ignored=[]
    )
    (folder / CONFIG_FILE).write_text(config.model_dump_json())
    return folder
