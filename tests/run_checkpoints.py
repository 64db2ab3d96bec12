"""Checkpoints of runs without a run: a manifest, and an engine that hands over whatever state a test gives it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mmd2v.config.training import CheckpointConfig
from mmd2v.distributed.environment import World
from mmd2v.train.checkpoints.manifest import Manifest
from mmd2v.train.checkpoints.saving import Checkpointer

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
FOUND = Manifest(
    format=1,
    step=4,
    sample_index=64,
    batch_size=16,
    world_size=2,
    zero_stage=1,
    precision="fp32",
    optimizer="AdamW",
    model={"width": 32, "layers": [{"kind": "separate", "count": 1}]},
    objectives=[{"kind": "contrastive"}],
    parameters={"norm.weight": [[32], 0], "layers.0.fc1.weight": [[128, 32], None]},
    stream={"seed": 3, "data.train (images)": 48, "data.tokenizer.kind": "hf"},
)


class StubEngine:
    """Stands for `Engine` and DeepSpeed's: ``files`` is file name → state."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files
        self.deepspeed = self
        self.module = SimpleNamespace(objectives=SimpleNamespace(rank_state=dict))
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(os.path.join(folder, tag), exist_ok=True)
        for name, state in self.files.items():
            self.checkpoint_engine.save(state, os.path.join(folder, tag, name))


def stub_engine(value: float = 0.0, size: int = 1000) -> StubEngine:
    return StubEngine(
        {
            "mp_rank_00_model_states.pt": {"module": {"w": torch.full((size,), value)}, "global_steps": 3},
            "zero_pp_rank_0_mp_rank_00_optim_states.pt": {"exp_avg": torch.full((size,), value)},
        }
    )


def write_checkpoint(run_dir: Path, step: int, **settings: Any) -> Path:
    """Write a whole checkpoint of one rank; its tensors are full of its step."""
    checkpointer = Checkpointer(run_dir, CheckpointConfig(**{"keep": 100, **settings}), ALONE)
    path = checkpointer.save(stub_engine(step), replace(FOUND, step=step, world_size=1))
    checkpointer.finish()
    checkpointer.close()  # waits for what is removed
    return path
