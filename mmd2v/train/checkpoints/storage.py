"""DeepSpeed's files: handed on to be written, read as tensors and plain values only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmd2v.train.checkpoints.writer import CheckpointWriter


def storage(writer: CheckpointWriter | None = None) -> Any:
    """Return a DeepSpeed checkpoint engine that hands its files to ``writer`` and reads tensors and plain values only.

    DeepSpeed ends a save with a barrier: a rank that raised before it would leave the others waiting, so the writer
    remembers errors. And DeepSpeed's own reader unpickles whatever a file says.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Storage(CheckpointEngine):
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            assert writer is not None and Path(path).parent == writer.folder
            writer.add(Path(path).name, state_dict)

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            assert writer is not None
            with writer.noting_errors():
                os.makedirs(path, exist_ok=exist_ok)

        def load(self, path: str, map_location: Any = None) -> Any:
            from mmd2v.train.checkpoints.reading import allowed_classes  # here: it names the classes below

            with allowed_classes():
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            return True

    return Storage()


def deepspeed_classes() -> list[Any]:
    """Classes of DeepSpeed and torch that its checkpoints name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
