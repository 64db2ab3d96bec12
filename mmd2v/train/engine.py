"""DeepSpeed around the train module: what is built of it, and its checkpoints' file format.

DeepSpeed is imported inside functions: it fixes its accelerator at its first import, and which one that is gets
decided in `mmd2v.distributed.environment`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmd2v.config.deepspeed import deepspeed_config
from mmd2v.config.schema import Config
from mmd2v.distributed.coordination import on_every_rank
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train.module import TrainModule
from mmd2v.train.optimizer import ParameterGroup, build_optimizer, parameter_groups
from mmd2v.train.schedule import Schedule
from mmd2v.train.skipping import GradientGate


@dataclass
class Engine:
    """A DeepSpeed engine and what this trainer keeps beside it."""

    deepspeed: Any
    groups: list[ParameterGroup]
    config: Config
    optimizer_name: str
    description: str
    """One line: which optimiser was chosen, and why."""
    converted: str = ""
    """Of a run continued from a checkpoint that had to be cut anew: what was done, to be told after its step."""
    gate: GradientGate | None = None
    """Where DeepSpeed itself would step over gradients that are not finite, and the config says to leave them out."""
    learning_rate: float = 0.0
    """Of the present step, without a group's multiplier."""

    @property
    def module(self) -> TrainModule:
        """The train module inside."""
        return self.deepspeed.module

    def forward(self, *inputs: Any) -> dict[str, torch.Tensor]:
        """Run the train module."""
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch; DeepSpeed divides by the accumulation and averages over ranks."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Finish a micro-batch; the last one of a step clips and updates the parameters."""
        self.deepspeed.step()

    def release(self) -> None:
        """Under ZeRO-3 let go of the weights that passes without a step have gathered, as a step does by itself."""
        offload = getattr(self.deepspeed.optimizer, "parameter_offload", None)
        if offload is not None:
            offload.partition_all_parameters()

    @property
    def left_out(self) -> bool:
        """Whether the last step was left out on every rank because its gradient was not finite."""
        if self.gate is not None:
            return self.gate.closed
        return bool(getattr(self.deepspeed.optimizer, "overflow", False))

    @property
    def overflows(self) -> int:
        """How many steps DeepSpeed has left out by itself."""
        return self.deepspeed.skipped_steps

    def set_learning_rate(self, schedule: Schedule, step: int) -> None:
        """Set every group's settings for optimiser step ``step``.

        All of them are written each time, not the rate alone, so that a resumed run follows its config and not the
        values inside the checkpoint.
        """
        settings = self.config.optimizer
        self.learning_rate = settings.lr * schedule.factor(step)
        for own, group in zip(self.groups, self.deepspeed.optimizer.param_groups, strict=True):
            group["lr"] = self.learning_rate * own.lr_multiplier
            group["weight_decay"] = own.weight_decay
            group["betas"] = settings.betas
            group["eps"] = settings.eps

    def followed(self) -> dict[str, float]:
        """Return what is worth following beside the losses: the objectives' own numbers and the gradient norm.

        Waits for the device, and under ZeRO-3 for the other ranks: every rank must call it.
        """
        objectives = self.module.objectives
        with self.gathered([p for p in objectives.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]):
            values = {name: float(value) for name, value in objectives.metrics().items()}
        norm = self.deepspeed.get_global_grad_norm()
        # At ZeRO-0 in fp32 DeepSpeed clips without keeping the norm; of a step that was left out it is infinite or -1.
        known = norm is not None and 0 <= float(norm) < math.inf
        return {**values, "gradient_norm": float(norm)} if known else values

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Make parameters that ZeRO-3 has sharded whole on every rank for a while."""
        if self.config.engine.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # The small ones that are whole already stay so: sharded on leaving, they would be missing from the order in
        # which DeepSpeed expects to fetch parameters.
        sharded = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
        return deepspeed.zero.GatheredParameters(sharded)


def build_engine(config: Config, world: World, module: TrainModule) -> Engine:
    """Hand the train module and its optimiser to DeepSpeed. Raises UserError when this machine cannot run them."""
    groups, (optimizer, description), options = on_every_rank(lambda: _ingredients(config, world, module))
    with quiet():
        import deepspeed

        _import_muon_uncompiled()
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options)
    _cast_statistics(module)
    skips = config.stability.non_finite == "skip"
    gate = GradientGate(optimizer) if skips and not hasattr(engine.optimizer, "overflow") else None
    return Engine(engine, groups, config, type(optimizer).__name__, description, gate=gate)


def _ingredients(
    config: Config, world: World, module: TrainModule
) -> tuple[list[ParameterGroup], tuple[torch.optim.Optimizer, str], dict[str, Any]]:
    """Make what DeepSpeed is given, and find every error of the config before the ranks begin to communicate."""
    _check_precision(config, world)
    options = deepspeed_config(config, world.size)
    groups = parameter_groups(config.optimizer, module.named_parameters())
    _without_shared_memory_collectives()
    module.to(world.device)
    return groups, build_optimizer(config, groups, world.device), options


PRODUCTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bf16_autocast": torch.bfloat16}
"""`engine.precision` → dtype of matrix products."""


def _check_precision(config: Config, world: World) -> None:
    precision = config.engine.precision
    if precision == "fp16" and world.device.type == "cpu":
        raise UserError("engine.precision: 'fp16' needs CUDA; on the CPU use 'auto', 'bf16_autocast', 'bf16' or 'fp32'")
    if precision.startswith("bf16") and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"engine.precision: this GPU has no bfloat16, which '{precision}' needs; a new run may use 'fp16' or 'fp32'"
        )


def _without_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its own CPU all-reduce, minutes of C++ at a first start; gloo has one."""
    import deepspeed

    # Written without being read: the first look makes DeepSpeed compile probes for all of its operators.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _import_muon_uncompiled() -> None:
    """Keep DeepSpeed from loading torch's compiler, seconds of every rank's start, for an optimiser that is not there.

    To ask whether an optimiser is its Muon, it imports Muon's module, whose functions are handed to torch.compile as
    they are defined. No optimiser here is one, so that in this process they may stay as they are.
    """
    # Where another version has no such modules, it does not import them either.
    with contextlib.suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler

        compile_now = compiler.compile
        compiler.compile = _uncompiled
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            compiler.compile = compile_now


def _uncompiled(*arguments: Any, **options: Any) -> Any:
    """Stand for torch.compile as a decorator, with options or without."""
    return arguments[0] if arguments and callable(arguments[0]) else lambda function: function


def _cast_statistics(module: nn.Module) -> None:
    """Give batch norms statistics of their weights' dtype: DeepSpeed casts parameters alone, and none takes both."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.weight is not None:
            for name, buffer in norm.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(norm, name, buffer.to(norm.weight.dtype))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what DeepSpeed and torch announce while they start; errors pass. MMD2V_VERBOSE=1 lets all through."""
    if os.environ.get("MMD2V_VERBOSE") == "1":
        yield
        return
    for name in ("DeepSpeed", "torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
