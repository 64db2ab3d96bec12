"""A loss or gradient that is no number, or a loss that jumps: how it is found, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mmd2v.config.schema import Config
from mmd2v.distributed.coordination import from_main_rank, shared_error
from mmd2v.errors import UserError
from mmd2v.train.checkpoints.manifest import Manifest
from mmd2v.train.engine import Engine
from mmd2v.train.finite import ADVICE, Diverged, diverged
from mmd2v.train.metrics import METRICS_FILE, LossMeter, recorded_losses
from mmd2v.train.skipping import LossWatch, RunningStatistics
from mmd2v.train.stability import RollBacks, SkipTally, SpikeGuard


class Trouble:
    """Decides, alike on all ranks, whether a step is left out and whether the run goes back.

    Attributes:
        skipped: the steps that were left out.
        roll_backs: how often the run has gone back.
    """

    def __init__(self, config: Config, engine: Engine, run_dir: Path, manifest: Manifest | None) -> None:
        """Go on from where an earlier part of the run has left it; every rank must call it."""
        settings = config.stability
        self._settings, self._fp16, self._engine = settings, config.engine.precision == "fp16", engine
        self._watch = LossWatch() if settings.non_finite == "skip" else None
        self._statistics = RunningStatistics(engine.module)
        self.skipped = SkipTally(settings, manifest.skipped_steps if manifest else 0)
        self.roll_backs = RollBacks(settings, manifest.roll_backs if manifest else ())
        known: list[tuple[int, float]] = from_main_rank(lambda: recorded_losses(run_dir / METRICS_FILE))
        self._spikes = SpikeGuard(settings, known)
        self._overflows = engine.overflows

    @property
    def skips(self) -> bool:
        """Whether steps may be left out."""
        return self._watch is not None

    def begin_step(self) -> None:
        """Keep what a step that is left out must not change."""
        if self._watch is not None:
            self._statistics.keep()

    def loss(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss to go backward from."""
        return losses["loss"] if self._watch is None else self._watch.watch(losses)

    def left_out(self, step: int) -> str | None:
        """Count a step (from 1) that no rank has applied, and return what to say of it; None of any other step.

        Every rank must call it. Raises UserError, naming the ranks, when there were more than allowed.
        """
        if self._watch is None:
            return None
        left_out = self._engine.left_out
        faults = self._watch.faults() if left_out else []
        self._watch.reset()
        # In fp16 a gradient that is not finite by itself is how DeepSpeed finds its loss scale.
        return self.skipped.count(step, faults) if left_out and (faults or not self._fp16) else None

    def undo_step(self) -> None:
        """Undo what a step that is left out has changed all the same."""
        self._statistics.restore()

    def read(self, meter: LossMeter, step: int) -> dict[str, float]:
        """Mean losses of the interval. Raises Diverged when they, or a gradient, are not finite."""
        losses = meter.read(step)
        before, self._overflows = self._overflows, self._engine.overflows
        if self._overflows > before and self._watch is None and not self._fp16:
            raise diverged(f"step {step}: the gradient became infinite or not a number on all ranks; {ADVICE}")
        return losses

    def judge(self, step: int, losses: Mapping[str, float]) -> None:
        """Raise Diverged when the loss of the interval that ends with ``step`` has jumped."""
        if "loss" in losses and (jump := self._spikes.judge(step, losses["loss"])):
            raise diverged(jump, spike=True)

    def allow_roll_back(self, error: Diverged, newest: Path | None) -> Path:
        """Count a roll-back and return the checkpoint to go to.

        Raises the error where the config says so, and UserError when there is no checkpoint or the run has gone back
        often enough.
        """
        if not error.spike and self._settings.non_finite != "roll_back":
            raise error
        try:
            self.roll_backs.allow(str(error), newest)
        except UserError as refused:
            raise shared_error(str(refused)) from None
        assert newest is not None  # allow has seen to it
        return newest

    def go_back(self, step: int) -> str:
        """Forget what came after the checkpoint of a step, now that it is loaded; return how often that was."""
        self._overflows = self._engine.overflows
        self._spikes.go_back(step)
        return f"roll-back {len(self.roll_backs.told)} of at most {self._settings.roll_backs}"
