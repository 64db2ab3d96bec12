"""A generated data set and the config of a run that takes seconds on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.distributed.environment import World
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.preemption import StopSignals
from mmd2v.files import write_text

if TYPE_CHECKING:
    from mmd2v.train.loop import Run

IMAGES = 48


def make_data(folder: Path) -> Path:
    """Write train and test shards, a tokenizer and a (random) teacher into ``folder``."""
    import timm
    import torch
    from safetensors.torch import save_file

    from mmd2v.cli import data

    for split, count in (("train", IMAGES), ("test", 12)):
        arguments = ["--split", split, "--count", count, "--size", 32, "--seed", 5, "--captions", 2]
        assert data.main(["synth", "--out", str(folder / split), *map(str, arguments)]) == 0
    assert data.main(["tokenizer", str(folder / "train"), "--out", str(folder / "tokenizer.json")]) == 0
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "teacher.safetensors")
    return folder


def write_config(file: Path, data: Path, **changes: Any) -> Path:
    """Write a run's YAML; ``changes`` are ``a__b=value``. The run directory is ``runs`` beside the file."""
    values: dict[str, Any] = {
        "name": file.stem,
        "run_dir": str(file.parent / "runs" / file.stem),
        "seed": 3,
        "steps": 3,
        "data": {
            "train": {"shards": str(data / "train")},
            "image": {"size": 32},
            "tokenizer": {"path": str(data / "tokenizer.json"), "max_length": 24},
            "workers": 0,
        },
        "model": {
            "width": 32,
            "heads": 4,
            "encoders": {"image": {"kind": "patch", "patch_size": 8}, "text": {"kind": "tokens"}},
            "layers": [{"kind": "separate"}, {"kind": "mome", "layer_scale": 0.5}, {"kind": "shared"}],
        },
        "teachers": {
            "resnet": {
                "name": f"timm:test_resnet@{data / 'teacher.safetensors'}",
                "precision": "fp32",
                "image_size": 32,
            }
        },
        "objectives": [{"kind": "contrastive"}, {"kind": "cls_regression", "teacher": "resnet"}],
        "optimizer": {"name": "adamw", "lr": 0.005, "clip_norm": 1.0},
        "engine": {"device": "cpu", "batch_size": 8, "precision": "fp32"},
        "logging": {"every": 1, "tensorboard": False},
    }
    return write_values(file, values, changes)


def write_values(file: Path, values: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write a YAML file of ``values`` with some ``a__b=value`` changed."""
    for path, value in changes.items():
        node = values
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    write_text(file, yaml.safe_dump(values))  # atomic: all ranks of a test write it
    return file


def run_config(file: Path, data: Path, **changes: Any) -> Config:
    """Return the config that `write_config` writes."""
    return load_config(write_config(file, data, **changes))


@contextmanager
def run_of(config: Config, world: World, resume: str | None = None) -> Iterator[Run]:
    """A run as `train` makes it, to look into before and after its ``train()``."""
    from mmd2v.train.loop import Run

    with StopSignals() as signals, Pulse(world, config.engine.rank_timeout) as pulse:
        run = Run(config, world, resume, signals, pulse)
        try:
            yield run
        finally:
            run.close()
