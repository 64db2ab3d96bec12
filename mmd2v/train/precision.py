"""Which precision a run is computed in where its config leaves that to the devices (``engine.precision: auto``).

It is decided here alone and once, as soon as the checkpoint to start from is known and before anything is built;
whoever reads the config afterwards finds a name, the run directory too. A run goes on in the precision of its
checkpoint, whatever the machine: weights, averages and loss scale in there are of that one. A new run multiplies in
bf16 where every rank's device has instructions for it, else everything is fp32. fp16 is for who asks for it by name:
it rounds the weights themselves, those of frozen encoders and the statistics of batch norms included, and leaves out
steps until DeepSpeed has found a loss scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from mmd2v.config.schema import Config
from mmd2v.config.training import AUTO, Precision
from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError, nearest
from mmd2v.train.checkpoints.manifest import MANIFEST, read_manifest
from mmd2v_kernels.half_products import half_of

_BY_ABILITY: tuple[Precision, ...] = ("fp32", "bf16_autocast")
"""What may be chosen, the one that every device can do first."""


def resolve_precision(config: Config, world: World, start: Path | None = None) -> tuple[Config, str]:
    """Return the config with its precision by name, the same on every rank, and a line that says why it is this one.

    ``start`` is the checkpoint that the run goes on from. The line is empty where the config itself names one. Every
    rank must call it. Raises UserError for a checkpoint whose precision is none of ours or needs another device.
    """
    if config.engine.precision != AUTO:
        return config, ""
    if start is not None:
        precision: Precision = from_main_rank(lambda: _of_checkpoint(start, world.device))
        why = f"as in {start}"
    else:
        precision, why = _agreed(gather_objects(usual_precision(world.device)))
    engine = config.engine.model_copy(update={"precision": precision})
    return config.model_copy(update={"engine": engine}), f"engine.precision: {AUTO} is {precision} here: {why}"


def usual_precision(device: torch.device) -> tuple[Precision, str]:
    """Return the precision of a new run on ``device`` alone, and why."""
    half, name = half_of(device), "processor" if device.type == "cpu" else "GPU"
    if half == torch.bfloat16:
        return "bf16_autocast", f"this {name} has instructions for products of bf16"
    other = "" if half is None else "; fp16, for models that bear its range, is faster"
    return "fp32", f"this {name} has no instructions for products of bf16{other}"


def _agreed(found: list[tuple[Precision, str]]) -> tuple[Precision, str]:
    """Return what all ranks can do, of what each of them found."""
    precision, why = min(found, key=lambda one: _BY_ABILITY.index(one[0]))
    able = [rank for rank, one in enumerate(found) if one[0] == precision]
    if len(able) == len(found):
        return precision, why
    ranks = f"rank{'s' * (len(able) > 1)} {', '.join(map(str, able))}"
    return precision, f"{why} ({ranks} of {len(found)}; all compute alike)"


def _of_checkpoint(start: Path, device: torch.device) -> Precision:
    precision, names = read_manifest(start).precision, get_args(Precision)
    if precision not in names:
        raise UserError(
            f"{start / MANIFEST}: precision: found '{precision}', expected {', '.join(names)}."
            f"{nearest(str(precision), names)}"
        )
    if precision == "fp16" and device.type == "cpu":
        raise UserError(
            f"engine.precision: {start} is of a run in fp16, which needs CUDA, and a run keeps its precision; go on "
            "with it on a GPU"
        )
    return precision
