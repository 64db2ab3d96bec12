"""One fp32 state dict from a DeepSpeed checkpoint of any ZeRO stage and number of ranks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from mmd2v.errors import UserError
from mmd2v.train.checkpoints.plain_paths import plain_path
from mmd2v.train.checkpoints.reading import plain_values_only, without_output

_WHOLE_MODULE = "mp_rank_00_model_states.pt"
"""DeepSpeed's file of the module's own state dict, written unless the weights themselves are sharded."""


def consolidate(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Return every parameter and saved buffer of the train module in a checkpoint folder, on the CPU.

    Floating point is fp32: the optimiser's master weights where ZeRO keeps them apart. Works on the files alone,
    whatever the machine has of devices and ranks. The files are read as tensors and plain values: no code in them runs.
    Raises UserError for a folder without or with an incomplete set of DeepSpeed's files.
    """
    folder = _engine_folder(Path(checkpoint))
    # Which accelerator DeepSpeed picks must not depend on the machine that happens to do the conversion.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with plain_values_only():
            state: dict[str, torch.Tensor] = {}
            whole = folder / _WHOLE_MODULE
            # ZeRO-1 lists its frozen parameters nowhere else, and ZeRO-3 has no such file.
            if whole.is_file():
                state.update(torch.load(whole, map_location="cpu")["module"])
            if any(folder.glob("*_optim_states.pt")):
                state.update(_from_zero(folder))
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{checkpoint}: the checkpoint is incomplete or damaged: {first_line}") from error
    # Clones: ZeRO's tensors are views of whole partitions, which safetensors refuses to write.
    return {
        name: (value.float() if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def _from_zero(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with plain_path(folder) as plain, without_output():
        return get_fp32_state_dict_from_zero_checkpoint(str(plain.parent), tag=plain.name)


def _engine_folder(checkpoint: Path) -> Path:
    """Return the one folder at or below ``checkpoint`` that holds DeepSpeed's files."""
    folders = sorted({file.parent for file in checkpoint.rglob("*_model_states.pt")})
    if len(folders) != 1:
        raise UserError(f"{checkpoint}: expected one folder of DeepSpeed model states in it, found {len(folders)}")
    return folders[0]
