"""The training loop. There is one, for every stage of every run; what differs is in the config."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.device import DeviceCopy
from mmd2v.data.loader import Loader
from mmd2v.data.stream import token_loader, train_loader
from mmd2v.data.trace import Trace, cut_other_traces
from mmd2v.distributed import environment
from mmd2v.distributed.buffers import average_buffers
from mmd2v.distributed.coordination import from_main_rank, on_every_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.preemption import Preempted, StopSignals
from mmd2v.distributed.vote import Ballot, StepVote
from mmd2v.errors import UserError
from mmd2v.files import check_output
from mmd2v.train.announcement import announce
from mmd2v.train.averages import averages, load_averages, save_averages, update_averages
from mmd2v.train.best import Best
from mmd2v.train.checkpoints.choosing import Choice, choose_checkpoint
from mmd2v.train.checkpoints.folders import restore_replaced, set_aside_after
from mmd2v.train.checkpoints.loading import load_checkpoint
from mmd2v.train.checkpoints.manifest import Manifest, describe
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.damage import DamageWatch
from mmd2v.train.engine import Engine
from mmd2v.train.evaluation import check_evaluation, evaluate, measures_anything, result_line
from mmd2v.train.farewell import interrupted, preempted
from mmd2v.train.finite import Diverged, check_weights
from mmd2v.train.interval import Interval
from mmd2v.train.metrics import (
    METRICS_FILE,
    SAVE_TIME,
    LossMeter,
    Reporter,
    is_evaluated,
    memory_gigabytes,
)
from mmd2v.train.outlook import look_ahead
from mmd2v.train.parts import Parts, build_parts
from mmd2v.train.precision import resolve_precision
from mmd2v.train.replay import Source, choose_sources
from mmd2v.train.run_dir import CONFIG_FILE, config_changes, describe_run
from mmd2v.train.saves import Saves
from mmd2v.train.seeds import position_seed
from mmd2v.train.trouble import Trouble


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
        # What is wrong with a config should come out before anything is loaded or written.
        self.outlook = look_ahead(config, world)
        self.plan, self.tokens, self.steps = self.outlook.plan, self.outlook.tokens, self.outlook.steps
        from_main_rank(lambda: check_output("run_dir", self.run_dir / CONFIG_FILE))
        from_main_rank(lambda: restore_replaced(self.run_dir))
        choice: Choice = from_main_rank(lambda: choose_checkpoint(self.run_dir, resume, config.checkpoint.verify))
        start = choice.path
        # Everything below reads the config with its precision by name.
        config, precision_said = resolve_precision(config, world, start)
        self.config = config

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
        self.saves = Saves(
            self.run_dir,
            config.checkpoint,
            world,
            self.checkpointer,
            self.step if start is not None else None,
            pause=self._pause,
            say=self.reporter.say,
        )
        self.meter = LossMeter()
        if manifest is not None:
            self.meter.load_state(manifest.interval, world, self.plan.accumulation)
        self.trouble = Trouble(config, self.engine, self.run_dir, manifest)
        self.damage = DamageWatch(self.run_dir, world, config.data.damage, self.outlook.samples, self.step)
        self.trace: Trace | None = None
        if config.data.trace:
            if world.is_main:
                cut_other_traces(config.data.trace, self.step, world.size)
            self.trace = Trace(config.data.trace, world.rank, self.step)
        self.copy = DeviceCopy(world.device, config.data.image)
        self.interval = Interval(
            world, self.steps, self.step, self.sample_index, counts_tokens=self.parts.tokenizer is not None
        )
        self._batches: Generator[Batch, None, None] | None = None
        announce(self.reporter.say, config, world, self.outlook, self.parts, self.engine, sources, precision_said)
        for line in choice.said:
            self.reporter.say(line)
        if start is not None:
            self.reporter.say(f"continuing from {start} at step {self.step}{self.engine.converted}")
        if branch is not None:
            self.reporter.say(branch)
        self.reporter.say(f"metrics: {self.run_dir / METRICS_FILE}")
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
        self.interval.stopwatch.reset()
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
        self.saves.finish()

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
            self.saves.finish()
        if ballot.stop and not last:
            self._leave(ballot.stop)

    def _cast(self) -> Ballot:
        """Tell all ranks what this one has to say, and return what all said a step before."""
        ballot = self.vote.cast(
            self.step, stop=self.signals.number, writing=self.checkpointer.busy, due=self.saves.clock_asks()
        )
        if ballot is None:
            return Ballot(self.step, writing=True)  # nothing is known yet
        return self.saves.without_the_past(ballot)

    def _leave_if_asked(self) -> None:
        """Raise Preempted, on every rank, if one has been sent a signal; outside of the steps, where it may wait."""
        if stop := self.vote.ask(self.step, stop=self.signals.number).stop:
            self._leave(stop)

    def _leave(self, stop: int) -> NoReturn:
        """Raise Preempted: all is saved that there is. Every rank must call it."""
        built = hasattr(self, "saves")
        if built:
            self.saves.finish()
        self.vote.close()
        newest = self.checkpointer.newest if built else None
        if built and self.saves.took is not None:
            did = f"saved step {self.step} in {newest} ({self.saves.took:.1f} s)"
        elif built:
            did = f"stopped after step {self.step}, with nothing new to save"
        else:
            did = "stopped before it began, with nothing to save"
        raise preempted(stop, did)

    def farewell(self) -> str:
        """What a person who pressed Ctrl-C should know."""
        return interrupted(self.step, self.steps, self.checkpointer.newest)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        self.engine.set_learning_rate(self.outlook.schedule, self.step)
        found: list[dict[str, torch.Tensor]] = []
        self.trouble.begin_step()
        for micro_step in range(self.plan.accumulation):
            asked = time.perf_counter()
            self.pulse.at(self.step, "waiting for data")
            batch = next(batches)
            self.pulse.at(self.step, "computing")
            self.interval.stopwatch.waited(time.perf_counter() - asked)
            self.interval.add_tokens(int(batch.text_lengths.sum()))  # they are on the host
            if self.trace is not None:
                self.trace.write(self.step, micro_step, batch.sample_ids)
            batch = replace(self.copy(batch), draw_seed=position_seed(self.config.seed, self.step))
            self.damage.add(batch.damaged)

            # A function of the position alone: a resumed run draws the same dropout without any stored state.
            torch.manual_seed(position_seed(self.config.seed, self.step, micro_step, self.world.rank))
            targets = {name: teacher(batch) for name, teacher in self.parts.teachers.items()}
            losses = self.engine.forward(batch, targets)
            self.engine.backward(self.trouble.loss(losses))
            self.engine.step()
            found.append({name: term.detach() for name, term in losses.items()})
        if not self._is_left_out():
            for losses in found:
                self.meter.add(losses)
            update_averages(self.parts.teachers, self.engine, self.step + 1, self.steps)
        # Samples of all ranks, which every rank knows: all micro-batches have as many, or this one tells their mean.
        micro_batch = len(batch) if batch.mean_over is None else batch.mean_over
        self.sample_index += round(micro_batch * self.plan.ranks * self.plan.accumulation)

    def _is_left_out(self) -> bool:
        """Whether no rank has applied the step, which is told and counted then; every rank must call it."""
        try:
            told = self.trouble.left_out(self.step + 1)
        except UserError as error:
            self.saves.finish()
            raise shared_error(str(error)) from None
        if told is None:
            return False
        self.reporter.say(told)
        self.trouble.undo_step()
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
        losses = self.trouble.read(self.meter, self.step)
        self.trouble.judge(self.step, losses)
        speed = self.interval.measure(self.step, self.sample_index)
        values = {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}
        values |= self.engine.followed()
        values |= {
            f"teachers/{name}/decay": teacher.ema.decay_at(self.step, self.steps)
            for name, teacher in averages(self.parts.teachers).items()
        }
        values |= {
            "learning_rate": self.engine.learning_rate,
            **self.loader.epochs(self.sample_index if self.tokens is None else self.step + self.steps_ahead),
            **speed,
            "memory(GB)": memory_gigabytes(self.world.device),
        }
        if self.trouble.skips:
            values["skipped_steps"] = self.trouble.skipped.total
        if self.saves.took is not None:
            values[SAVE_TIME], self.saves.took = self.saves.took, None
        self.reporter.record(self.step, values)
        self.reporter.training_line(self.step, values)
        self._report_damage()
        self.meter.reset()
        self.interval.begin(self.step, self.sample_index)

    def _report_damage(self) -> None:
        if told := self.damage.report(self.step):
            self.reporter.say(told)

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
        return self.saves.better(metrics, self.step)

    def _evaluate_saved(self) -> None:
        """Measure at a step that has its checkpoint already, as a rule."""
        better = self._evaluate()
        # Without a checkpoint of this step, the run was continued from that of another run.
        if better is not None and not self.saves.keep_as_best(better):
            self._save(better)
            self.saves.finish()

    def _save(self, better: Best | None = None) -> None:
        """Begin a checkpoint of the present step, the best one if so; `Saves.finish` puts it in place."""
        self.saves.begin(
            better,
            self._describe_whole,
            lambda manifest: self.checkpointer.save(
                self.engine, manifest, lambda to: save_averages(self.parts.teachers, to), best=better is not None
            ),
        )

    def _describe_whole(self) -> Manifest:
        """Describe a state to be saved. Raises Diverged when it holds no numbers; every rank must call it."""
        self.trouble.read(self.meter, self.step)
        check_weights(self.engine.module, self.step)
        self._report_damage()
        average_buffers(self.engine.module)
        return replace(
            self._describe(),
            interval=self.meter.state(self.plan.accumulation),
            skipped_steps=self.trouble.skipped.total,
            roll_backs=self.trouble.roll_backs.told,
            steps_ahead=self.steps_ahead,
        )

    def _load(self, checkpoint: Path) -> Manifest:
        """Put a checkpoint's state into the engine and the averages; the position in the data is for the caller."""
        manifest = load_checkpoint(self.engine, checkpoint, self._describe())
        on_every_rank(lambda: load_averages(self.parts.teachers, checkpoint))
        self.step = manifest.step
        return manifest

    def _roll_back(self, error: Diverged) -> None:
        """Go back to the newest checkpoint, and on with the data after the present step; every rank must call it.

        Weights, optimiser, step and learning rate are those of the checkpoint. Raises the error where the config says
        so, and UserError when there is no checkpoint or the run has gone back often enough.
        """
        self.saves.finish()  # what was saved before is well, whatever follows
        found: Path | None = from_main_rank(lambda: self.checkpointer.newest)
        newest = self.trouble.allow_roll_back(error, found)
        assert self._batches is not None
        diverged_at = self.step
        with self._pause("rolling back"):
            self._batches.close()
            manifest = self._load(newest)
            self.meter.load_state(manifest.interval, self.world, self.plan.accumulation)
            self.steps_ahead += diverged_at - self.step
            counted = self.trouble.go_back(self.step)
            self.reporter.go_back(self.step)
            if self.trace is not None:
                self.trace.close()
                self.trace = Trace(self.trace.file, self.world.rank, self.step)
            self.loader = self._loader()
            self._batches = iter(self.loader)
        self.reporter.say(
            f"warning: {error}; rolled back to {newest}, on with the data after step {diverged_at} ({counted})"
        )
        self.first_step = self.step
        self.saves.note_last(self.step)
        self.interval.start_over(self.step, self.sample_index)

    def _describe(self) -> Manifest:
        facts = self.outlook.facts
        return describe(self.engine, self.config, self.world, self.step, self.sample_index, facts, self.tokens)

    @contextmanager
    def _pause(self, phase: str) -> Iterator[None]:
        """Time that counts as no work of the interval."""
        start = time.perf_counter()
        self.pulse.at(self.step, phase)
        yield
        self.pulse.at(self.step, "computing")
        self.interval.stopwatch.paused(time.perf_counter() - start)
