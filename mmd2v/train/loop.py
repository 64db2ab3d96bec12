"""The training loop. There is one, for every stage of every run; what differs is in the config."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from mmd2v.config.batch_plan import BatchPlan, plan_batches, total_steps
from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.device import DeviceCopy
from mmd2v.data.loader import Loader
from mmd2v.data.stream import TrainFacts, token_loader, train_facts, train_loader
from mmd2v.data.trace import Trace, cut_other_traces
from mmd2v.distributed import environment
from mmd2v.distributed.buffers import average_buffers
from mmd2v.distributed.collectives import mean_over_ranks
from mmd2v.distributed.coordination import from_main_rank, on_every_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.preemption import REQUEUE_STATUS, Preempted, StopSignals, signal_name
from mmd2v.distributed.vote import Ballot, StepVote
from mmd2v.errors import UserError
from mmd2v.files import check_output
from mmd2v.train.averages import averages, load_averages, save_averages, update_averages
from mmd2v.train.best import Best, best_of, find_best, write_best
from mmd2v.train.checkpoints.choosing import Choice, choose_checkpoint
from mmd2v.train.checkpoints.folders import restore_replaced, set_aside_after
from mmd2v.train.checkpoints.loading import load_checkpoint
from mmd2v.train.checkpoints.manifest import Manifest, describe
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.damage import DamageWatch
from mmd2v.train.engine import PRODUCTS, Engine
from mmd2v.train.evaluation import check_evaluation, evaluate, measures_anything, result_line
from mmd2v.train.finite import ADVICE, Diverged, check_weights, diverged
from mmd2v.train.metrics import (
    METRICS_FILE,
    SAVE_TIME,
    LossMeter,
    Reporter,
    Stopwatch,
    is_evaluated,
    memory_gigabytes,
    recorded_losses,
)
from mmd2v.train.parts import Parts, build_parts
from mmd2v.train.replay import Source, choose_sources
from mmd2v.train.run_dir import CONFIG_FILE, config_changes, describe_run
from mmd2v.train.schedule import Schedule, build_schedule
from mmd2v.train.skipping import LossWatch, RunningStatistics
from mmd2v.train.stability import RollBacks, SkipTally, SpikeGuard
from mmd2v.train.token_batches import prepare_token_order
from mmd2v_kernels import describe as describe_kernels


def train(config: Config, resume: str | None = None) -> None:
    """Train a run from its config.

    ``resume`` is None (a new run), ``"auto"`` (the newest checkpoint of ``run_dir``, or a new run) or the path of a
    checkpoint. Every rank of a launcher calls this. Raises UserError for bad input and for a checkpoint that cannot
    be written, OSError where the disk refuses another file of the run, and Preempted when a rank was sent SIGTERM or
    SIGUSR1 and all have saved.
    """
    run: Run | None = None
    with StopSignals() as signals:
        world = environment.initialize(config.engine.device)
        with Pulse(world, config.engine.rank_timeout, peaceful=(Preempted,)) as pulse:
            try:
                run = Run(config, world, resume, signals, pulse)
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

    def __init__(self, config: Config, world: World, resume: str | None, signals: StopSignals, pulse: Pulse) -> None:
        self.config, self.world, self.signals, self.pulse = config, world, signals, pulse
        self.run_dir = Path(config.run_dir)
        self.step, self.sample_index = 0, 0
        self.vote = StepVote(world)
        self._save_began = 0.0
        self._save_took: float | None = None
        """Seconds of the last save, until they are reported."""
        self._better: Best | None = None
        """What the checkpoint that is being written will be as the best one."""
        # What is wrong with a config should come out before anything is loaded or written.
        self.plan: BatchPlan = from_main_rank(lambda: plan_batches(config, world.size))
        batch = None if config.data.batch_tokens else self.plan.global_batch
        self.facts: TrainFacts = from_main_rank(lambda: train_facts(config.data, seed=config.seed, batch=batch))
        self.tokens = prepare_token_order(config, self.plan.ranks * self.plan.accumulation)
        self.steps = total_steps(
            config, self.plan, self.facts.samples, None if self.tokens is None else self.tokens.epoch_steps
        )
        self.schedule: Schedule = from_main_rank(lambda: build_schedule(config.optimizer, self.steps))
        from_main_rank(lambda: check_output("run_dir", self.run_dir / CONFIG_FILE))
        from_main_rank(lambda: restore_replaced(self.run_dir))
        choice: Choice = from_main_rank(lambda: choose_checkpoint(self.run_dir, resume, config.checkpoint.verify))
        start = choice.path

        self._leave_if_asked()  # before anything large is loaded
        sources: dict[str, Source] = from_main_rank(lambda: choose_sources(config, self.plan, self.steps, world.device))
        self.parts: Parts = on_every_rank(lambda: build_parts(config, world, sources))
        on_every_rank(lambda: check_evaluation(config, self.parts.student))
        self.engine: Engine = self.parts.engine(config, world)
        self.steps_ahead = 0
        manifest: Manifest | None = None
        if start is not None:
            manifest = self._load(start)
            self.sample_index, self.steps_ahead = manifest.sample_index, manifest.steps_ahead
        self.first_step = self.step
        branch: str | None = from_main_rank(lambda: set_aside_after(self.run_dir, self.first_step))

        self.checkpointer = Checkpointer(self.run_dir, config.checkpoint, world)
        pulse.newest = lambda: self.checkpointer.newest
        changes = config_changes(self.run_dir, config) if start is not None and world.is_main else []
        if world.is_main and (start is None or self.step < self.steps):  # a finished run keeps its config
            describe_run(self.run_dir, config, world, self.engine.description)
        self.reporter = Reporter(self.run_dir, world, self.steps, self.step, config.logging.tensorboard)
        self.best: Best | None = from_main_rank(lambda: self._find_best())
        self.checkpointer.best = self.best.step if self.best else None
        self.meter, self.stopwatch = LossMeter(), Stopwatch()
        if manifest is not None:
            self.meter.load_state(manifest.interval, world, self.plan.accumulation)
        self._prepare_for_trouble(manifest)
        samples = self.facts.samples if self.tokens is None else self.tokens.texts
        self.damage = DamageWatch(self.run_dir, world, config.data.damage, samples, self.step)
        self.trace: Trace | None = None
        if config.data.trace:
            if world.is_main:
                cut_other_traces(config.data.trace, self.step, world.size)
            self.trace = Trace(config.data.trace, world.rank, self.step)
        self.copy = DeviceCopy(world.device, config.data.image)
        self._working, self._reported, self._samples_reported = 0.0, self.step, self.sample_index
        self._text_tokens = 0
        self._batches: Generator[Batch, None, None] | None = None
        self._saved = self.step if start is not None else None
        """Step of the last checkpoint."""
        self._due = time.monotonic()
        """When the clock last asked for a checkpoint, or one was begun."""
        self._announce(choice, branch, sources)
        if changes:
            self.reporter.say("changed since the run was started:\n  " + "\n  ".join(changes))

    def train(self) -> None:
        """Run from the present step to the last. Raises Preempted, on every rank, when one was asked to stop."""
        self._leave_if_asked()
        self.loader = self._loader()
        self.engine.module.train()

        # Before the first step: recall of the untrained model, if asked for.
        if self.config.evaluation.at_start and self.step == 0:
            self._evaluate()
            self._leave_if_asked()

        # One that a signal left out.
        if self._evaluates() and 0 < self.step < self.steps and not self._is_evaluated():
            self._evaluate_saved()
            self._leave_if_asked()

        self._batches = iter(self.loader)
        self.stopwatch.reset()
        while self.step < self.steps:
            try:
                self._train_step(self._batches)
                self.step += 1
                self.reporter.progress(self.step)
                self._between_steps()
            except Diverged as error:
                self._roll_back(error)
        self._batches.close()

        # A run of no steps keeps the model it starts from.
        if self.steps == 0 and self.checkpointer.newest is None:
            self._save()
        self._finish_save()

        # A finished run that is started again has its last recall already.
        if not self._is_evaluated():
            if measures_anything(self.config):
                self._leave_if_asked()
            self._evaluate_saved()
        self.vote.close()
        self.reporter.say(f"finished: step {self.step} of {self.steps}, run in {self.run_dir}")

    def _evaluates(self) -> bool:
        """Whether the config asks for an evaluation at the present step."""
        every = self.config.evaluation.every
        return every is not None and self.step % every == 0

    def _is_evaluated(self) -> bool:
        return from_main_rank(lambda: is_evaluated(self.run_dir / METRICS_FILE, self.step))

    def _between_steps(self) -> None:
        """What is done once in a while, after a step."""
        config, last = self.config, self.step == self.steps
        ballot = self._cast()
        saves = last or (config.checkpoint.every is not None and self.step % config.checkpoint.every == 0)

        # Once an interval: the only place where the host waits for the device. An interval ends at a checkpoint
        # too, so that a run continued from there has the same ones.
        if self.step % config.logging.every == 0 or saves:
            self._report()

        # After the first step: when all of the data is damaged, the settings are, and the run should not go on.
        if self.step == self.first_step + 1:
            self._report_damage()

        # Once in a while: recall on the held-out set. The last one comes after the last checkpoint.
        # A signal does not wait for it: the run that goes on makes up for it.
        better = self._evaluate() if self._evaluates() and not last and not ballot.stop else None

        # Once in a while and at the end: a checkpoint; also of the best model, and when the clock or a signal asks for
        # one. Those come at no fixed step: they end no interval, which the run that goes on from there ends where this
        # one would have.
        if saves or better or ballot.due or ballot.stop:
            self._save(better)
        elif self.checkpointer.pending and not ballot.writing:
            self._finish_save()
        if ballot.stop and not last:
            self._leave(ballot.stop)

    def _cast(self) -> Ballot:
        """Tell all ranks what this one has to say, and return what all said a step before."""
        ballot = self.vote.cast(
            self.step, stop=self.signals.number, writing=self.checkpointer.busy, due=self._clock_asks()
        )
        if ballot is None:
            return Ballot(self.step, writing=True)  # nothing is known yet
        if self._saved is not None and ballot.step <= self._saved:
            # Cast before the last save began: it knows nothing of that.
            return replace(ballot, writing=True, due=False)
        return ballot

    def _clock_asks(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; once for each time. The clock is no calendar: it never jumps.

        Other ranks leave the question to rank 0.
        """
        minutes, now = self.config.checkpoint.minutes, time.monotonic()
        if not self.world.is_main or minutes is None or now - self._due < 60 * minutes:
            return False
        self._due = now
        return True

    def _leave_if_asked(self) -> None:
        """Raise Preempted, on every rank, if one has been sent a signal; outside of the steps, where it may wait."""
        if stop := self.vote.ask(self.step, stop=self.signals.number).stop:
            self._leave(stop)

    def _leave(self, stop: int) -> NoReturn:
        """Raise Preempted: all is saved that there is. Every rank must call it."""
        built = hasattr(self, "checkpointer")
        if built:
            self._finish_save()
        self.vote.close()
        newest = self.checkpointer.newest if built else None
        if self._save_took is not None:
            did = f"saved step {self.step} in {newest} ({self._save_took:.1f} s)"
        elif built:
            did = f"stopped after step {self.step}, with nothing new to save"
        else:
            did = "stopped before it began, with nothing to save"
        raise Preempted(
            f"{signal_name(stop)}: {did}; exit status {REQUEUE_STATUS} asks the scheduler to queue the run again; "
            "continue with --resume auto"
        )

    def farewell(self) -> str:
        """What a person who pressed Ctrl-C should know."""
        newest = self.checkpointer.newest
        kept = f"the last checkpoint is {newest}; continue with --resume auto" if newest else "there is no checkpoint"
        return f"interrupted after step {self.step} of {self.steps}; {kept}"

    def _train_step(self, batches: Iterator[Batch]) -> None:
        self.engine.set_learning_rate(self.schedule, self.step)
        found: list[dict[str, torch.Tensor]] = []
        if self.watch is not None:
            self.statistics.keep()
        for micro_step in range(self.plan.accumulation):
            asked = time.perf_counter()
            self.pulse.at(self.step, "waiting for data")
            batch = next(batches)
            self.pulse.at(self.step, "computing")
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
            self.engine.backward(losses["loss"] if self.watch is None else self.watch.watch(losses))
            self.engine.step()
            found.append({name: term.detach() for name, term in losses.items()})
        if self.watch is None or not self._is_left_out(self.watch):
            for losses in found:
                self.meter.add(losses)
            update_averages(self.parts.teachers, self.engine, self.step + 1, self.steps)
        # Samples of all ranks, which every rank knows: all micro-batches have as many, or this one tells their mean.
        micro_batch = len(batch) if batch.mean_over is None else batch.mean_over
        self.sample_index += round(micro_batch * self.plan.ranks * self.plan.accumulation)

    def _is_left_out(self, watch: LossWatch) -> bool:
        """Whether no rank has applied the step, which is told and counted then; every rank must call it."""
        left_out = self.engine.left_out
        faults = watch.faults() if left_out else []
        watch.reset()
        # In fp16 a gradient that is not finite by itself is how DeepSpeed finds its loss scale.
        if not left_out or (self.config.engine.precision == "fp16" and not faults):
            return False
        try:
            self.reporter.say(self.skipped.count(self.step + 1, faults))
        except UserError as error:
            self._finish_save()
            raise shared_error(str(error)) from None
        self.statistics.restore()
        return True

    def close(self) -> None:
        """Finish the files and end the loader's processes. Does not communicate."""
        if self._batches is not None:
            self._batches.close()
        self.checkpointer.close()
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
                start_step=self.step + self.steps_ahead,
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
        losses = self._read_meter()
        if "loss" in losses and (jump := self.spikes.judge(self.step, losses["loss"])):
            raise diverged(jump, spike=True)
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
            **self.loader.epochs(self.sample_index if self.tokens is None else self.step + self.steps_ahead),
            "throughput(samples/s)": (self.sample_index - self._samples_reported) / seconds,
            **self._token_throughput(seconds),
            "time/step(s)": seconds / interval,
            "time/data(%)": 100 * self.stopwatch.waiting / seconds,
            "time/eta(s)": per_step * (self.steps - self.step),
            "memory(GB)": memory_gigabytes(self.world.device),
        }
        if self.watch is not None:
            values["skipped_steps"] = self.skipped.total
        if self._save_took is not None:
            values[SAVE_TIME], self._save_took = self._save_took, None
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

    def _evaluate(self) -> Best | None:
        """Measure and record; return what this step would be as the best one, if it is; every rank must call it."""
        if not measures_anything(self.config):
            return None
        with self._pause("evaluating"):
            average_buffers(self.engine.module)
            metrics = evaluate(self.config, self.parts, self.world)
            self.engine.release()
        self.reporter.record(self.step, {f"evaluation/{name}": value for name, value in metrics.items()})
        self.reporter.say(f"step {self.step}/{self.steps}  {result_line(metrics)}")
        found = best_of(self.config.checkpoint.best, metrics, self.step)
        return found if found is not None and found.beats(self._better or self.best) else None

    def _evaluate_saved(self) -> None:
        """Measure at a step that has its checkpoint already, as a rule."""
        better = self._evaluate()
        if better is None:
            return
        if self.checkpointer.keep_as_best(self.step):
            self._new_best(better)
        else:  # it was continued from the checkpoint of another run
            self._save(better)
            self._finish_save()

    def _new_best(self, best: Best) -> None:
        """Tell of the best checkpoint, now that it is in place."""
        self.best = best
        from_main_rank(lambda: write_best(self.run_dir, best))
        self.reporter.say(best.said())

    def _find_best(self) -> Best | None:
        """Return the best of the checkpoints there are; on rank 0 alone."""
        best = find_best(self.config.checkpoint.best, self.run_dir)
        write_best(self.run_dir, best)
        return best

    def _save(self, better: Best | None = None) -> None:
        """Begin a checkpoint of the present step, the best one if so; `_finish_save` puts it in place."""
        self._finish_save()
        with self._pause("saving"):
            self._read_meter()
            check_weights(self.engine.module, self.step)
            self._report_damage()
            average_buffers(self.engine.module)
            manifest = replace(
                self._describe(),
                interval=self.meter.state(self.plan.accumulation),
                skipped_steps=self.skipped.total,
                roll_backs=self.roll_backs.told,
                steps_ahead=self.steps_ahead,
            )
            self._save_began = time.monotonic()
            self._better = better
            self.checkpointer.save(
                self.engine, manifest, lambda to: save_averages(self.parts.teachers, to), best=better is not None
            )
            self._saved, self._due = self.step, time.monotonic()
        if not self.checkpointer.pending:  # it was written at once
            self._note_saved()

    def _finish_save(self) -> None:
        """Put the last checkpoint in place, if that has not been done; waits for its files."""
        if self.checkpointer.pending:
            with self._pause("saving"):
                self.checkpointer.finish()
            self._note_saved()

    def _note_saved(self) -> None:
        self._save_took = time.monotonic() - self._save_began
        if self._better is not None:
            self._new_best(self._better)
            self._better = None

    def _load(self, checkpoint: Path) -> Manifest:
        """Put a checkpoint's state into the engine and the averages; the position in the data is for the caller."""
        manifest = load_checkpoint(self.engine, checkpoint, self._describe())
        on_every_rank(lambda: load_averages(self.parts.teachers, checkpoint))
        self.step = manifest.step
        return manifest

    def _prepare_for_trouble(self, manifest: Manifest | None) -> None:
        """Make what answers a loss that is no number or jumps, from where an earlier part of the run has left it."""
        settings = self.config.stability
        self.watch = LossWatch() if settings.non_finite == "skip" else None
        self.statistics = RunningStatistics(self.engine.module)
        self.skipped = SkipTally(settings, manifest.skipped_steps if manifest else 0)
        self.roll_backs = RollBacks(settings, manifest.roll_backs if manifest else ())
        known: list[tuple[int, float]] = from_main_rank(lambda: recorded_losses(self.run_dir / METRICS_FILE))
        self.spikes = SpikeGuard(settings, known)
        self._overflows = self.engine.overflows

    def _read_meter(self) -> dict[str, float]:
        """Mean losses of the interval. Raises Diverged when they, or a gradient, are not finite."""
        losses = self.meter.read(self.step)
        before, self._overflows = self._overflows, self.engine.overflows
        if self._overflows > before and self.watch is None and self.config.engine.precision != "fp16":
            raise diverged(f"step {self.step}: the gradient became infinite or not a number on all ranks; {ADVICE}")
        return losses

    def _roll_back(self, error: Diverged) -> None:
        """Go back to the newest checkpoint, and on with the data after the present step; every rank must call it.

        Weights, optimiser, step and learning rate are those of the checkpoint. Raises the error where the config says
        so, and UserError when there is no checkpoint or the run has gone back often enough.
        """
        self._finish_save()  # what was saved before is well, whatever follows
        if not error.spike and self.config.stability.non_finite != "roll_back":
            raise error
        newest: Path | None = from_main_rank(lambda: self.checkpointer.newest)
        try:
            self.roll_backs.allow(str(error), newest)
        except UserError as refused:
            raise shared_error(str(refused)) from None
        assert newest is not None and self._batches is not None  # allow has seen to the first
        diverged_at = self.step
        with self._pause("rolling back"):
            self._batches.close()
            manifest = self._load(newest)
            self.meter.load_state(manifest.interval, self.world, self.plan.accumulation)
            self.steps_ahead += diverged_at - self.step
            self._overflows = self.engine.overflows
            self.spikes.go_back(self.step)
            self.reporter.go_back(self.step)
            if self.trace is not None:
                self.trace.close()
                self.trace = Trace(self.trace.file, self.world.rank, self.step)
            self.loader = self._loader()
            self._batches = iter(self.loader)
        self.reporter.say(
            f"warning: {error}; rolled back to {newest}, on with the data after step {diverged_at} (roll-back "
            f"{len(self.roll_backs.told)} of at most {self.config.stability.roll_backs})"
        )
        self._saved, self._due, self.first_step, self._working = self.step, time.monotonic(), self.step, 0.0
        self._reported, self._samples_reported, self._text_tokens = self.step, self.sample_index, 0
        self.stopwatch.reset()

    def _describe(self) -> Manifest:
        return describe(self.engine, self.config, self.world, self.step, self.sample_index, self.facts, self.tokens)

    @contextmanager
    def _pause(self, phase: str) -> Iterator[None]:
        """Time that counts as no work of the interval."""
        start = time.perf_counter()
        self.pulse.at(self.step, phase)
        yield
        self.pulse.at(self.step, "computing")
        self.stopwatch.paused(time.perf_counter() - start)

    def _announce(self, choice: Choice, branch: str | None, sources: dict[str, Source]) -> None:
        device = f"{self.world.device.type}, {self.config.engine.precision}, ZeRO-{self.config.engine.zero_stage}"
        self.reporter.say(f"run {self.config.name} on {device}: {self.plan}, {self.steps} steps")
        if self.tokens is not None:
            self.reporter.say(f"an epoch: {self.tokens}")
        self.reporter.say(describe_kernels(self.world.device, PRODUCTS[self.config.engine.precision]))
        self.reporter.say(f"optimiser: {self.engine.description}")
        for source in sources.values():
            self.reporter.say(source.said)
        for doubt in self.parts.doubts(self.config):
            self.reporter.say(f"warning: {doubt}")
        for line in choice.said:
            self.reporter.say(line)
        if choice.path is not None:
            self.reporter.say(f"continuing from {choice.path} at step {self.step}{self.engine.converted}")
        if branch is not None:
            self.reporter.say(branch)
        self.reporter.say(f"metrics: {self.run_dir / METRICS_FILE}")


def position_seed(seed: int, *position: int) -> int:
    """Return 63 well-mixed bits for a place in a run: a step, and a micro-step and rank within it."""
    mixed = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1
