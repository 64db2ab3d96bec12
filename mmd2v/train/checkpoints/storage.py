"""DeepSpeed's files: written with errors remembered, read as tensors and plain values only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from mmd2v.errors import disk_message


def storage() -> Any:
    """Return a DeepSpeed checkpoint engine that remembers write errors and reads tensors and plain values only.

    DeepSpeed ends a save with a barrier: a rank that raised before it would leave the others waiting. And its own
    reader unpickles whatever a file says.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Storage(CheckpointEngine):
        error: str | None = None

        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            if self.error is None:
                self.error = guarded(lambda: _save_file(state_dict, path))

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            if self.error is None:
                self.error = guarded(lambda: os.makedirs(path, exist_ok=exist_ok))

        def load(self, path: str, map_location: Any = None) -> Any:
            from mmd2v.train.checkpoints.reading import allowed_classes  # here: it names the classes below

            with allowed_classes():
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            return True

    return Storage()


def guarded(action: Callable[[], Any]) -> str | None:
    """Run what writes; return what went wrong with the disk, None if nothing did."""
    try:
        action()
    except OSError as error:
        return disk_message(error)
    return None


def _save_file(value: Any, path: str) -> None:
    with open(path, "wb") as handle:
        try:
            torch.save(value, handle)
        except RuntimeError as error:
            # torch's archive, closed after a failed write, complains about its own position instead of the disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        handle.flush()
        os.fsync(handle.fileno())


def deepspeed_classes() -> list[Any]:
    """Classes of DeepSpeed and torch that its checkpoints name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
