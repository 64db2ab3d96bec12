"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mmd2v.config.schema import Config
from mmd2v.distributed.environment import World
from mmd2v.train.engine import PRODUCTS, Engine
from mmd2v.train.outlook import Outlook
from mmd2v.train.parts import Parts
from mmd2v.train.replay import Source
from mmd2v_kernels import describe as describe_kernels
from mmd2v_kernels.half_products import half_of, multiplies


def announce(
    say: Callable[[str], None],
    config: Config,
    world: World,
    outlook: Outlook,
    parts: Parts,
    engine: Engine,
    sources: Mapping[str, Source],
    precision_said: str = "",
) -> None:
    """Say on what the run will be trained, and how, a line each; ``precision_said`` is why in this precision."""
    device = f"{world.device.type}, {config.engine.precision}, ZeRO-{config.engine.zero_stage}"
    say(f"run {config.name} on {device}: {outlook.plan}, {outlook.steps} steps")
    if precision_said:
        say(precision_said)
    if outlook.tokens is not None:
        say(f"an epoch: {outlook.tokens}")
    say(describe_kernels(world.device, PRODUCTS[config.engine.precision]))
    say(f"optimiser: {engine.description}")
    for source in sources.values():
        say(source.said)
    for doubt in [*_slow_products(config.engine.precision, world.device), *parts.doubts(config)]:
        say(f"warning: {doubt}")


def _slow_products(precision: str, device: torch.device) -> list[str]:
    """Half precision that the device has no instructions for; a checkpoint's may be one too."""
    products = PRODUCTS[precision]
    if device.type == "cuda":
        able, name, faster = products != torch.bfloat16 or half_of(device) == products, "GPU", "fp16 or fp32 is faster"
    else:
        able, name = products == torch.float32 or half_of(device) == products, "processor"
        faster = "fp32 is faster" if multiplies(device.type, products) else "fp32 is several times faster"
    if able:
        return []
    return [
        f"engine.precision: found {precision}, but this {name} has no instructions for its products; a new run with "
        f"--engine.precision {faster} here"
    ]
