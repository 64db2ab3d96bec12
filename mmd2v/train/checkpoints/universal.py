"""DeepSpeed's universal checkpoint: a file for every parameter and moment, which any number of ranks can read.

It is made of a ZeRO checkpoint by DeepSpeed's own converter, in this process, and read by DeepSpeed's engine. What
neither of them takes care of is done here: parameters that are not trained and buffers, parts of the optimiser that a
rank has no element of, and counters of steps.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmd2v.errors import UserError
from mmd2v.train.checkpoints.plain_paths import plain_path
from mmd2v.train.checkpoints.reading import plain_values_only, without_output
from mmd2v.train.consolidate import consolidate
from mmd2v.train.engine import Engine

_UNTRAINED = "untrained.safetensors"


def convert(checkpoint: Path, target: Path, module: nn.Module) -> None:
    """Write the universal form of ``checkpoint`` (ZeRO 1 to 3) into the new folder ``target``; for one rank alone.

    ``module`` says which parameters are frozen and which buffers there are. The checkpoint itself is left as it is.
    Raises OSError, or one of many other errors, when its files are damaged or the disk refuses.
    """
    from deepspeed.checkpoint import ds_to_universal

    with plain_path(checkpoint) as source, plain_path(target) as destination:
        options = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(destination),
            # In this process: others would not know that they must not unpickle.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with plain_values_only(), without_output():
            ds_to_universal.main(options)
        if names := [*_frozen(module), *_buffers(module)]:
            state = consolidate(source)
            if missing := [name for name in names if name not in state]:
                raise UserError(f"{checkpoint}: the checkpoint is damaged: it holds no {missing[0]}")
            save_file({name: state[name] for name in names}, target / _UNTRAINED)


def load(engine: Engine, folder: Path) -> None:
    """Put a universal checkpoint into the engine; every rank must call it. Raises as DeepSpeed does."""
    deepspeed = engine.deepspeed
    # Before DeepSpeed's loading, which ends with gathering what ZeRO-3 keeps whole.
    _load_untrained(engine, folder)
    deepspeed._config.load_universal_checkpoint = True
    try:
        with plain_path(folder) as plain, plain_values_only(), _with_empty_pieces(engine):
            loaded, _ = deepspeed.load_checkpoint(str(plain.parent), tag=plain.name, load_lr_scheduler_states=False)
    finally:
        deepspeed._config.load_universal_checkpoint = False
    if loaded is None:
        raise FileNotFoundError("files of DeepSpeed are missing")
    _separate_counters(deepspeed.optimizer.optimizer)


def _frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are saved."""
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


@torch.no_grad()
def _load_untrained(engine: Engine, folder: Path) -> None:
    frozen, buffers = _frozen(engine.module), _buffers(engine.module)
    if not (frozen or buffers):
        return
    state = load_file(folder / _UNTRAINED)
    for name, buffer in buffers.items():
        buffer.copy_(state[name])
    for name, parameter in frozen.items():
        with _writable(engine, parameter):
            parameter.copy_(state[name])


def _writable(engine: Engine, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Make one parameter whole, and under ZeRO-3 shard anew what was written to it."""
    if engine.config.engine.zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


@contextlib.contextmanager
def _with_empty_pieces(engine: Engine) -> Iterator[None]:
    """Lend a piece of no elements to every optimiser group of which this rank holds nothing (ZeRO 1 and 2).

    DeepSpeed reads the step and the kinds of moments of a group from its pieces, and fails where there is none: with
    a group of a single temperature, say, on all ranks but the first.
    """
    if engine.config.engine.zero_stage not in (1, 2):
        yield
        return
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    optimizer, lent = engine.deepspeed.optimizer, []
    for index, group in enumerate(optimizer.bit16_groups):
        if any(parameter._hp_mapping is not None for parameter in group):
            continue
        group[0]._hp_mapping = tensor_fragment(
            lp_fragment=group[0].data.flatten()[:0],
            lp_fragment_address=fragment_address(numel=0, start=0),
            hp_fragment=optimizer.single_partition_of_fp32_groups[index].flatten()[:0],
            hp_fragment_address=fragment_address(numel=0, start=0),
            gradient_dict={},
            offload_gradient_dict={},
            use_offload=False,
            param_group_index=index,
        )
        lent.append(group[0])
    try:
        yield
    finally:
        for parameter in lent:
            parameter._hp_mapping = None


def _separate_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give every state a step counter of its own, where its tensor is.

    Under ZeRO-3 DeepSpeed hands one tensor to all of them, and torch's AdamW would count it up once for each; and it
    reads them to the CPU, where a fused optimiser on CUDA does not look.
    """
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)
