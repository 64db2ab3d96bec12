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
from mmd2v_kernels.half_products import multiplies


def announce(
    say: Callable[[str], None],
    config: Config,
    world: World,
    outlook: Outlook,
    parts: Parts,
    engine: Engine,
    sources: Mapping[str, Source],
) -> None:
    """Say on what the run will be trained, and how, a line each."""
    device = f"{world.device.type}, {config.engine.precision}, ZeRO-{config.engine.zero_stage}"
    say(f"run {config.name} on {device}: {outlook.plan}, {outlook.steps} steps")
    if outlook.tokens is not None:
        say(f"an epoch: {outlook.tokens}")
    say(describe_kernels(world.device, PRODUCTS[config.engine.precision]))
    say(f"optimiser: {engine.description}")
    for source in sources.values():
        say(source.said)
    for doubt in [*_slow_products(config.engine.precision, world.device), *parts.doubts(config)]:
        say(f"warning: {doubt}")


def _slow_products(precision: str, device: torch.device) -> list[str]:
    """Half precision that a processor has no instructions for."""
    if multiplies(device.type, PRODUCTS[precision]):
        return []
    return [
        f"engine.precision: found {precision}, but this processor has no instructions for its products; "
        "--engine.precision fp32 is several times faster here"
    ]
