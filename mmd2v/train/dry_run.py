"""What a run would be, without data and without writing anything: config, sizes, memory, one step on a mock batch."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mmd2v.config.batch_plan import BatchPlan, plan_batches, total_steps
from mmd2v.config.load import dump_config
from mmd2v.config.schema import Config
from mmd2v.config.structure import each_layer
from mmd2v.data.batch import Batch
from mmd2v.data.stream import train_facts
from mmd2v.distributed import environment
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import ModalityEncoder
from mmd2v.models.parameters import part
from mmd2v.train.averages import update_averages
from mmd2v.train.engine import Engine
from mmd2v.train.evaluation import check_evaluation
from mmd2v.train.metrics import LossMeter, memory_gigabytes
from mmd2v.train.mock import mock_batch
from mmd2v.train.parts import Parts, build_parts
from mmd2v.train.precision import resolve_precision
from mmd2v.train.replay import Source, choose_sources
from mmd2v.train.schedule import build_schedule
from mmd2v.train.token_batches import known_token_order

MB = 1e6
_WIDTH = 120  # columns where the output is no terminal


def dry_run(config: Config) -> None:
    """Print what the run would be and do one step of it on random images and tokens; no file is touched.

    Every rank of a launcher calls this. Raises UserError for whatever would stop the run (other than its data).
    """
    world = environment.initialize(config.engine.device)
    console = Console(quiet=not world.is_main, highlight=False)
    if not console.is_terminal:
        console = Console(quiet=not world.is_main, highlight=False, width=_WIDTH)
    config, precision_said = resolve_precision(config, world)
    console.rule("config")
    console.print(dump_config(config), markup=False, soft_wrap=True)
    if precision_said:
        said = f"{precision_said}; on other devices, or from a checkpoint, it may be another"
        console.print(said, markup=False, soft_wrap=True)

    plan = from_main_rank(lambda: plan_batches(config, world.size))
    console.rule("batches")
    console.print(_describe_batches(config, plan), markup=False, soft_wrap=True)

    sources = from_main_rank(lambda: _choose_sources(config, plan, world))
    parts = on_every_rank(lambda: build_parts(config, world, sources))
    on_every_rank(lambda: check_evaluation(config, parts.student))
    console.rule("parameters")
    console.print(parameter_table(parts))
    for source in sources.values():
        console.print(source.said, markup=False, soft_wrap=True)
    batch = mock_batch(config, parts.tokenizer, _mock_samples(plan, parts), outputs=parts.outputs)
    console.rule("memory of a rank, estimated")
    console.print(_memory_table(estimate_memory(config, parts, batch, world.size)))

    console.rule("one step on a mock batch")
    engine = parts.engine(config, world)
    console.print(f"optimiser: {engine.description}", markup=False, soft_wrap=True)
    console.print(_mock_step(config, world, parts, engine, plan, batch), markup=False, soft_wrap=True)


def _mock_samples(plan: BatchPlan, parts: Parts) -> int:
    """Samples of a micro-batch; of tokens: as many of the longest texts as it may have."""
    if plan.unit != "tokens" or parts.tokenizer is None:
        return plan.micro_batch
    return plan.micro_batch // parts.tokenizer.max_length + 1


def _choose_sources(config: Config, plan: BatchPlan, world: World) -> dict[str, Source]:
    steps = config.steps or 1  # what is not known (the batches above say so) cannot keep a teacher from its outputs
    if config.steps is None and config.data.batch_tokens is None:
        with suppress(UserError):
            steps = total_steps(config, plan, _samples(config, plan))
    return choose_sources(config, plan, steps, world.device)


# ------------------------------------------------------------------------------------------- batches


def _describe_batches(config: Config, plan: BatchPlan) -> str:
    if config.data.batch_tokens is not None:
        return _describe_token_batches(config, plan)
    lines = [str(plan)]
    images = None
    try:
        images = _samples(config, plan)
        lines.append(f"data.train: {images} {plan.unit} = {images / plan.global_batch:.1f} steps an epoch")
    except UserError as error:
        lines.append(f"data.train: size unknown, so are the steps an epoch ({error}); without it no run will start")
    if config.steps is None and images is None:
        lines.append(f"{config.epochs:g} epochs: total steps unknown")
        return "\n".join(lines)
    steps = total_steps(config, plan, images)
    schedule = build_schedule(config.optimizer, steps)
    lines.append(
        f"{steps} steps = {steps * plan.global_batch} {plan.unit}"
        + (f" = {steps * plan.global_batch / images:.2f} epochs" if images else "")
        + f"; {schedule.warmup} of them warm-up, then {schedule.shape}"
    )
    return "\n".join(lines)


def _samples(config: Config, plan: BatchPlan) -> int:
    return train_facts(config.data, seed=config.seed, batch=plan.global_batch).samples


def _describe_token_batches(config: Config, plan: BatchPlan) -> str:
    lines = [str(plan)]
    order = None
    try:
        order = known_token_order(config)
        order.check_parts(plan.ranks * plan.accumulation)
        lines.append(f"data.train, an epoch: {order}")
    except UserError as error:
        lines.append(f"data.train: steps an epoch unknown ({error})")
    if config.steps is None and order is None:
        return "\n".join([*lines, f"{config.epochs:g} epochs: total steps unknown"])
    steps = total_steps(config, plan, None, None if order is None else order.epoch_steps)
    schedule = build_schedule(config.optimizer, steps)
    epochs = "" if order is None else f" = {steps / order.epoch_steps:.2f} epochs"
    return "\n".join([*lines, f"{steps} steps{epochs}; {schedule.warmup} of them warm-up, then {schedule.shape}"])


# ---------------------------------------------------------------------------------------- parameters


def parameter_counts(parts: Parts) -> dict[str, tuple[int, int]]:
    """Return part of the train module → (trainable, frozen) parameters; fixed position tables count as frozen."""
    trainable: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in parts.module.named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        (trainable if parameter.requires_grad else frozen)[part(name)] += count
    for name, buffer in parts.module.named_buffers():
        if name.endswith(".positions"):
            frozen[part(name)] += buffer.numel()
    names = dict.fromkeys(part(name) for name, _ in parts.module.named_parameters())
    return {name: (trainable[name], frozen[name]) for name in names}


def parameter_table(parts: Parts) -> Table:
    """Make the table of parameters a part: trainable, frozen, teacher."""
    table = Table("part", box=box.SIMPLE)
    for title in ("trainable", "frozen", "teacher"):
        table.add_column(title, justify="right")
    counts = parameter_counts(parts)
    for name, (trainable, frozen) in counts.items():
        table.add_row(name, f"{trainable:,}", f"{frozen:,}", "")
    for name, teacher in parts.teachers.items():
        table.add_row(f"teachers.{name}", "", "", f"{teacher.parameter_count:,}")
    table.add_section()
    sums = [sum(column) for column in zip(*counts.values(), strict=True)]
    teachers = sum(teacher.parameter_count for teacher in parts.teachers.values())
    table.add_row("all", *(f"{number:,}" for number in (*sums, teachers)))
    return table


# -------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    teachers: float
    bank: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes of everything."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(config: Config, parts: Parts, batch: Batch, ranks: int) -> MemoryEstimate:
    """Estimate a rank's memory (ZeRO: Rajbhandari et al. 2020, section 3); activations to a factor of about two.

    Adam keeps two fp32 averages, and a fp32 copy of half-precision weights. Stage 1 divides these by the ranks,
    stage 2 the gradients, stage 3 the weights. A layer keeps about 8 + 2 · mlp_ratio values of its width a token; with
    checkpoints of activations one layer at a time does, and every other its input. The bank is what an objective keeps
    from step to step, a rank's share of it.
    """
    engine = config.engine
    half = engine.precision in ("bf16", "fp16")
    size = 2 if half else 4
    counts = parameter_counts(parts).values()
    trainable, frozen = (sum(column) for column in zip(*counts, strict=True))
    share = [1 if engine.zero_stage < stage else ranks for stage in (1, 2, 3)]
    encoders = [encoder for encoder in parts.student.encoders.values() if isinstance(encoder, ModalityEncoder)]
    tokens = sum(int(encoder.lengths(batch).sum()) for encoder in encoders)
    of_layer = [8 + 2 * layer.mlp_ratio for layer in each_layer(config.model)]
    layer_values = sum(of_layer)
    if config.model.activation_checkpointing:
        layer_values = len(of_layer) + max(of_layer, default=0)
    return MemoryEstimate(
        weights=(trainable + frozen) * size / share[2],
        gradients=trainable * size / share[1],
        optimizer=trainable * (12 if half else 8) / share[0],
        teachers=sum(teacher.parameter_count * teacher.dtype.itemsize for teacher in parts.teachers.values()),
        bank=sum(tensor.nbytes for tensor in parts.module.objectives.rank_state().values()),
        activations=tokens * layer_values * config.model.width * (4 if engine.precision == "fp32" else 2),
    )


def _memory_table(estimate: MemoryEstimate) -> Table:
    table = Table("what", box=box.SIMPLE)
    table.add_column("MB", justify="right")
    labels = {"bank": "memory bank", "activations": "activations of the layers (rough)"}
    for name in (field.name for field in fields(estimate)):
        table.add_row(labels.get(name, name), f"{getattr(estimate, name) / MB:,.1f}")
    table.add_section()
    table.add_row("all", f"{estimate.total / MB:,.1f}")
    return table


# ----------------------------------------------------------------------------------------- mock step


def _mock_step(config: Config, world: World, parts: Parts, engine: Engine, plan: BatchPlan, batch: Batch) -> str:
    """Run forward, backward and update; return a line with losses, time and memory."""
    meter = LossMeter()
    batch = batch.to(world.device)
    torch.manual_seed(config.seed)
    engine.module.train()
    start = time.perf_counter()
    for _ in range(plan.accumulation):
        losses = engine.forward(batch, {name: teacher(batch) for name, teacher in parts.teachers.items()})
        engine.backward(losses["loss"])
        engine.step()
        meter.add(losses)
    update_averages(parts.teachers, engine, 1, 1)
    found = meter.read(step=1)  # waits for the device
    seconds = time.perf_counter() - start
    terms = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
    return f"{terms}\nforward, backward and update in {seconds:.2f} s, memory {memory_gigabytes(world.device):.2f} GB"
