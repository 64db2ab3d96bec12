"""The training loop. There is one, for every stage of every run; what differs is in the config."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmd2v.config.batch_plan import BatchPlan, plan_batches, total_steps
from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.device import DeviceCopy
from mmd2v.data.loader import Loader
from mmd2v.data.stream import TrainFacts, token_loader, train_facts, train_loader
from mmd2v.data.trace import Trace
from mmd2v.distributed import environment
from mmd2v.distributed.buffers import average_buffers
from mmd2v.distributed.collectives import mean_over_ranks
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.distributed.environment import World
from mmd2v.train.averages import averages, load_averages, save_averages, update_averages
from mmd2v.train.checkpoints.folders import find_checkpoint, restore_replaced, set_aside_after
from mmd2v.train.checkpoints.loading import load_checkpoint
from mmd2v.train.checkpoints.manifest import Manifest, describe
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.damage import DamageWatch
from mmd2v.train.engine import Engine
from mmd2v.train.evaluation import check_evaluation, evaluate, recall_line
from mmd2v.train.finite import check_weights
from mmd2v.train.metrics import METRICS_FILE, LossMeter, Reporter, Stopwatch, is_evaluated, memory_gigabytes
from mmd2v.train.parts import Parts, build_parts
from mmd2v.train.replay import Source, choose_sources
from mmd2v.train.run_dir import config_changes, describe_run
from mmd2v.train.schedule import Schedule, build_schedule
from mmd2v.train.token_batches import prepare_token_order


def train(config: Config, resume: str | None = None) -> None:
    """Train a run from its config.

    ``resume`` is None (a new run), ``"auto"`` (the newest checkpoint of ``run_dir``, or a new run) or the path of a
    checkpoint. Every rank of a launcher calls this. Raises UserError for bad input and for a checkpoint that cannot
    be written, OSError where the disk refuses another file of the run.
    """
    world = environment.initialize(config.engine.device)
    run: Run | None = None
    try:
        run = Run(config, world, resume)
        run.train()
    except KeyboardInterrupt:
        if run is not None and world.is_main:
            print(run.farewell(), file=sys.stderr)
        raise
    finally:
        if run is not None:
            run.close()


class Run:
    """One run on this rank: what it is built of, where it stands, and the loop."""

    def __init__(self, config: Config, world: World, resume: str | None) -> None:
        self.config, self.world = config, world
        self.run_dir = Path(config.run_dir)
        # What is wrong with a config should come out before anything is loaded or written.
        self.plan: BatchPlan = from_main_rank(lambda: plan_batches(config, world.size))
        batch = None if config.data.batch_tokens else self.plan.global_batch
        self.facts: TrainFacts = from_main_rank(lambda: train_facts(config.data, seed=config.seed, batch=batch))
        self.tokens = prepare_token_order(config, self.plan.ranks * self.plan.accumulation)
        self.steps = total_steps(
            config, self.plan, self.facts.samples, None if self.tokens is None else self.tokens.epoch_steps
        )
        self.schedule: Schedule = from_main_rank(lambda: build_schedule(config.optimizer, self.steps))
        from_main_rank(lambda: restore_replaced(self.run_dir))
        start: Path | None = from_main_rank(lambda: find_checkpoint(self.run_dir, resume))

        sources: dict[str, Source] = from_main_rank(lambda: choose_sources(config, self.plan, self.steps, world.device))
        self.parts: Parts = on_every_rank(lambda: build_parts(config, world, sources))
        on_every_rank(lambda: check_evaluation(config, self.parts.student))
        self.engine: Engine = self.parts.engine(config, world)
        self.step, self.sample_index = 0, 0
        if start is not None:
            manifest = load_checkpoint(self.engine, start, self._describe())
            self.step, self.sample_index = manifest.step, manifest.sample_index
            on_every_rank(lambda: load_averages(self.parts.teachers, start))
        self.first_step = self.step
        branch: str | None = from_main_rank(lambda: set_aside_after(self.run_dir, self.first_step))

        self.checkpointer = Checkpointer(self.run_dir, config.checkpoint.keep, world)
        changes = config_changes(self.run_dir, config) if start is not None and world.is_main else []
        if world.is_main and (start is None or self.step < self.steps):  # a finished run keeps its config
            describe_run(self.run_dir, config, world, self.engine.description)
        self.reporter = Reporter(self.run_dir, world, self.steps, self.step, config.logging.tensorboard)
        self.meter, self.stopwatch = LossMeter(), Stopwatch()
        samples = self.facts.samples if self.tokens is None else self.tokens.texts
        self.damage = DamageWatch(self.run_dir, world, config.data.damage, samples, self.step)
        self.trace = Trace(config.data.trace, world.rank, self.step) if config.data.trace else None
        self.copy = DeviceCopy(world.device, config.data.image)
        self._working, self._reported, self._samples_reported = 0.0, self.step, self.sample_index
        self._text_tokens = 0
        self._announce(start, branch, sources)
        if changes:
            self.reporter.say("changed since the run was started:\n  " + "\n  ".join(changes))

    def train(self) -> None:
        """Run from the present step to the last."""
        config, every = self.config, self.config.logging.every
        self.loader = self._loader()
        batches = iter(self.loader)
        self.engine.module.train()

        # Before the first step: recall of the untrained model, if asked for.
        if config.evaluation.at_start and self.step == 0:
            self._evaluate()

        self.stopwatch.reset()
        while self.step < self.steps:
            self._train_step(batches)
            self.step += 1
            self.reporter.progress(self.step)
            last = self.step == self.steps
            saves = last or (config.checkpoint.every is not None and self.step % config.checkpoint.every == 0)

            # Once an interval: the only place where the host waits for the device. An interval ends at a checkpoint
            # too, so that a run continued from there has the same ones.
            if self.step % every == 0 or saves:
                self._report()

            # After the first step: when all of the data is damaged, the settings are, and the run should not go on.
            if self.step == self.first_step + 1:
                self._report_damage()

            # Once in a while: recall on the held-out set. The last one comes after the last checkpoint.
            if config.evaluation.every and self.step % config.evaluation.every == 0 and not last:
                self._evaluate()

            # Once in a while and at the end: a checkpoint.
            if saves:
                self._save()

        # A run of no steps keeps the model it starts from.
        if self.steps == 0 and self.checkpointer.newest is None:
            self._save()

        # A finished run that is started again has its last recall already.
        if not from_main_rank(lambda: is_evaluated(self.run_dir / METRICS_FILE, self.step)):
            self._evaluate()
        self.reporter.say(f"finished: step {self.step} of {self.steps}, run in {self.run_dir}")

    def farewell(self) -> str:
        """What a person who pressed Ctrl-C should know."""
        newest = self.checkpointer.newest
        kept = f"the last checkpoint is {newest}; continue with --resume auto" if newest else "there is no checkpoint"
        return f"interrupted after step {self.step} of {self.steps}; {kept}"

    def _train_step(self, batches: Iterator[Batch]) -> None:
        self.engine.set_learning_rate(self.schedule, self.step)
        for micro_step in range(self.plan.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            self.stopwatch.waited(time.perf_counter() - asked)
            self._text_tokens += int(batch.text_lengths.sum())  # they are on the host
            if self.trace is not None:
                self.trace.write(self.step, micro_step, batch.sample_ids)
            batch = replace(self.copy(batch), draw_seed=position_seed(self.config.seed, self.step))
            self.damage.add(batch.damaged)

            # A function of the position alone: a resumed run draws the same dropout without any stored state.
            torch.manual_seed(position_seed(self.config.seed, self.step, micro_step, self.world.rank))
            targets = {name: teacher(batch) for name, teacher in self.parts.teachers.items()}
            losses = self.engine.forward(batch, targets)
            self.engine.backward(losses["loss"])
            self.engine.step()
            self.meter.add(losses)
        update_averages(self.parts.teachers, self.engine, self.step + 1, self.steps)
        # Samples of all ranks, which every rank knows: all micro-batches have as many, or this one tells their mean.
        micro_batch = len(batch) if batch.mean_over is None else batch.mean_over
        self.sample_index += round(micro_batch * self.plan.ranks * self.plan.accumulation)

    def close(self) -> None:
        """Finish the files."""
        self.reporter.close()
        if self.trace is not None:
            self.trace.close()

    def _loader(self) -> Loader:
        if self.tokens is not None:
            assert self.parts.tokenizer is not None  # the schema's condition
            return token_loader(
                self.config.data,
                seed=self.config.seed,
                tokenizer=self.parts.tokenizer,
                order=self.tokens,
                rank=self.world.rank,
                world_size=self.world.size,
                accumulation=self.plan.accumulation,
                start_step=self.step,
                label_classes=self.config.label_classes,
            )
        return train_loader(
            self.config.data,
            seed=self.config.seed,
            tokenizer=self.parts.tokenizer,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch_size=self.plan.micro_batch,
            accumulation=self.plan.accumulation,
            start_index=self.sample_index,
            images=self.parts.uses_images,
            label_classes=self.config.label_classes,
            outputs=self.parts.outputs,
            arrays=self.config.array_inputs,
        )

    def _report(self) -> None:
        losses = self.meter.read(self.step)
        seconds = self.stopwatch.working
        interval = self.step - self._reported
        self._working += seconds
        per_step = self._working / (self.step - self.first_step)
        values = {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}
        values |= self.engine.followed()
        values |= {
            f"teachers/{name}/decay": teacher.ema.decay_at(self.step, self.steps)
            for name, teacher in averages(self.parts.teachers).items()
        }
        values |= {
            "learning_rate": self.engine.learning_rate,
            **self.loader.epochs(self.sample_index if self.tokens is None else self.step),
            "throughput(samples/s)": (self.sample_index - self._samples_reported) / seconds,
            **self._token_throughput(seconds),
            "time/step(s)": seconds / interval,
            "time/data(%)": 100 * self.stopwatch.waiting / seconds,
            "time/eta(s)": per_step * (self.steps - self.step),
            "memory(GB)": memory_gigabytes(self.world.device),
        }
        self.reporter.record(self.step, values)
        self.reporter.training_line(self.step, values)
        self._report_damage()
        self._reported, self._samples_reported = self.step, self.sample_index
        self._text_tokens = 0
        self.meter.reset()
        self.stopwatch.reset()

    def _report_damage(self) -> None:
        if told := self.damage.report(self.step):
            self.reporter.say(told)

    def _token_throughput(self, seconds: float) -> dict[str, float]:
        """Text tokens of all ranks; every rank must call it."""
        if self.parts.tokenizer is None:
            return {}
        own = torch.tensor(float(self._text_tokens), dtype=torch.float64, device=self.world.device)
        return {"throughput(tokens/s)": float(mean_over_ranks(own)) * self.world.size / seconds}

    def _evaluate(self) -> None:
        if self.config.data.eval is None:
            return
        with self._pause():
            average_buffers(self.engine.module)
            metrics = evaluate(self.config, self.parts, self.world)
        self.reporter.record(self.step, {f"evaluation/{name}": value for name, value in metrics.items()})
        self.reporter.say(f"step {self.step}/{self.steps}  recall  {recall_line(metrics)}")

    def _save(self) -> None:
        with self._pause():
            check_weights(self.engine.module, self.step)  # the report before has looked at the loss
            average_buffers(self.engine.module)
            self.checkpointer.save(self.engine, self._describe(), lambda to: save_averages(self.parts.teachers, to))

    def _describe(self) -> Manifest:
        return describe(self.engine, self.config, self.world, self.step, self.sample_index, self.facts, self.tokens)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stopwatch.paused(time.perf_counter() - start)

    def _announce(self, start: Path | None, branch: str | None, sources: dict[str, Source]) -> None:
        device = f"{self.world.device.type}, {self.config.engine.precision}, ZeRO-{self.config.engine.zero_stage}"
        self.reporter.say(f"run {self.config.name} on {device}: {self.plan}, {self.steps} steps")
        if self.tokens is not None:
            self.reporter.say(f"an epoch: {self.tokens}")
        self.reporter.say(f"optimiser: {self.engine.description}")
        for source in sources.values():
            self.reporter.say(source.said)
        for doubt in self.parts.doubts(self.config):
            self.reporter.say(f"warning: {doubt}")
        if start is not None:
            self.reporter.say(f"continuing from {start} at step {self.step}")
        if branch is not None:
            self.reporter.say(branch)
        self.reporter.say(f"metrics: {self.run_dir / METRICS_FILE}")


def position_seed(seed: int, *position: int) -> int:
    """Return 63 well-mixed bits for a place in a run: a step, and a micro-step and rank within it."""
    mixed = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1
