"""What a run says about itself: lines or a progress bar, ``metrics.jsonl`` and TensorBoard, units in the names.

Nothing here waits for the device between two reports: loss terms are summed where they are.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from mmd2v.distributed.collectives import gather_objects, mean_over_ranks
from mmd2v.distributed.environment import World
from mmd2v.errors import disk_message
from mmd2v.files import naming, write_text
from mmd2v.progress import duration
from mmd2v.train.finite import ADVICE, diverged

METRICS_FILE = "metrics.jsonl"
SAVE_TIME = "time/save(s)"
"""From the start of a save until its files were in place: what a run needs of the time between signal and end."""

_TOKENS = "throughput(tokens/s)"


class LossMeter:
    """Sums loss terms on the device; reading them is the only synchronisation."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._count = 0

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Add the terms of one micro-batch."""
        if tuple(losses) != self._names:  # a checkpoint of other objectives has cut the interval
            self.reset()
            self._names = tuple(losses)
        values = torch.stack([term.detach().float() for term in losses.values()])
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def read(self, step: int) -> dict[str, float]:
        """Return each term's mean over micro-batches and ranks since the last reset, on every rank.

        Raises Diverged naming the ranks on which a term is not finite.
        """
        if self._sum is None:
            return {}
        own = self._sum / self._count
        means = dict(zip(self._names, mean_over_ranks(own).tolist(), strict=True))
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            ranks = [rank for rank, finite in enumerate(gather_objects(bool(own.isfinite().all()))) if not finite]
            raise diverged(
                f"step {step}: {', '.join(bad)} became {means[bad[0]]} on rank(s) {', '.join(map(str, ranks))}; "
                f"{ADVICE}"
            )
        return means

    def reset(self) -> None:
        """Start a new interval."""
        self._sum, self._count = None, 0

    def state(self, accumulation: int) -> dict[str, Any] | None:
        """Return what every rank has summed since the last reset, as plain values; None when that is nothing.

        ``accumulation`` is the number of micro-batches of a step. Waits for the device; every rank must call it.
        """
        if self._sum is None:
            return None
        sums = gather_objects(self._sum.tolist())
        about = {"terms": list(self._names), "micro_batches": self._count, "accumulation": accumulation}
        return {**about, "sums": sums}

    def load_state(self, state: Mapping[str, Any] | None, world: World, accumulation: int) -> None:
        """Go on with an interval that a checkpoint has cut, to the last bit if there are as many ranks as then.

        With another number of micro-batches a step (``accumulation``) what there is counts for as many steps as then.
        """
        self.reset()
        if state is None:
            return
        sums = torch.tensor(state["sums"])  # fp32, as they were summed
        factor = accumulation / state["accumulation"]
        self._names, self._count = tuple(state["terms"]), state["micro_batches"] * factor
        self._sum = (factor * (sums[world.rank] if len(sums) == world.size else sums.mean(0))).to(world.device)


class Stopwatch:
    """Host seconds of the interval since the last report: all, waiting for data, and pauses that count as neither."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self._start = time.perf_counter()
        self.waiting = 0.0
        self._pauses = 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent in the loader."""
        self.waiting += seconds

    def paused(self, seconds: float) -> None:
        """Take an evaluation or a checkpoint out of the interval."""
        self._pauses += seconds

    @property
    def working(self) -> float:
        """Seconds of the interval without pauses."""
        return time.perf_counter() - self._start - self._pauses


def memory_gigabytes(device: torch.device) -> float:
    """Peak memory of this rank: the allocator's on CUDA, the process's own on the CPU (now, not peak). GB = 1e9 B."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


class Reporter:
    """Rank 0's voice; the other ranks hold one that is silent."""

    def __init__(self, run_dir: Path, world: World, steps: int, first_step: int, tensorboard: bool) -> None:
        self._speaks = world.is_main
        self._steps = steps
        self._eta = ""
        self._bar: Any = None
        self._task: Any = None
        self._file: Any = None
        self._writer: Any = None
        self._run_dir, self._tensorboard = run_dir, tensorboard
        if not self._speaks:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open_files(first_step)
        if sys.stdout.isatty():
            self._start_bar(first_step)

    def _open_files(self, step: int) -> None:
        path = self._run_dir / METRICS_FILE
        # A new run keeps nothing, not even the step-0 records of one that was killed before its first checkpoint.
        forget_after(path, step if step else -1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def go_back(self, step: int) -> None:
        """Forget the records after ``step``, at which the run has a checkpoint: it goes on from there."""
        if self._speaks:
            self._close_files()
            self._open_files(step)
            self.progress(step)

    def _start_bar(self, first_step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), redirect_stdout=True)
        self._bar.start()
        self._task = self._bar.add_task(f"step {first_step}/{self._steps}", total=self._steps, completed=first_step)

    def progress(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"step {step}/{self._steps}{self._eta}")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of ``metrics.jsonl`` and the TensorBoard scalars."""
        if not self._speaks:
            return
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._writer is not None:
            with naming(self._writer.log_dir):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            with naming("standard output"):  # it may be a file on a disk that is full
                print(text, flush=True)

    def training_line(self, step: int, values: Mapping[str, float]) -> None:
        """Print the line of one interval; a bar shows its ETA until the next one."""
        losses = "  ".join(f"{short_name(name)} {value:.4f}" for name, value in values.items() if is_loss(name))
        tokens = f"{values[_TOKENS]:,.0f} tokens/s  " if _TOKENS in values else ""
        saved = f"saved in {values[SAVE_TIME]:.1f} s  " if SAVE_TIME in values else ""
        text = (
            f"step {step}/{self._steps}  {losses}  lr {values['learning_rate']:.2e}  "
            f"{values['throughput(samples/s)']:.1f} samples/s  {tokens}data {values['time/data(%)']:.0f}%  "
            f"{values['memory(GB)']:.2f} GB  {saved}ETA {duration(values['time/eta(s)'])}"
        )
        self._eta = f"  ETA {duration(values['time/eta(s)'])}"
        self.say(text)

    def close(self) -> None:
        """Finish the bar and the files."""
        if self._bar is not None:
            self._bar.stop()
        self._close_files()

    def _close_files(self) -> None:
        if self._writer is not None:
            _close(self._writer)
        if self._file is not None:
            with suppress(OSError):  # each record was written at once: what is left is one that failed, and was told
                self._file.close()


def _close(writer: Any) -> None:
    """Close TensorBoard's files; an error here must not hide the one that ends the run, which has the same cause."""
    try:
        writer.close()
    except OSError as error:
        print(f"warning: {writer.log_dir}: the last curves are lost: {disk_message(error)}", file=sys.stderr)


def is_loss(name: str) -> bool:
    """Whether a metric is the sum of the loss or one of its terms."""
    return name == "loss" or name.startswith("loss/")


def short_name(name: str) -> str:
    """Drop the words a line does not need: ``loss/cls_regression_loss/image`` → ``cls_regression/image``."""
    return name.removeprefix("loss/").replace("_loss", "")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line that a killed run left unfinished is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def recorded_losses(path: Path) -> list[tuple[int, float]]:
    """Return step and loss of every interval that is recorded."""
    return [(r["step"], r["loss"]) for r in (read_metrics(path) if path.exists() else []) if "loss" in r]


def is_evaluated(path: Path, step: int) -> bool:
    """Whether a recall at ``step`` is recorded."""
    records = read_metrics(path) if path.exists() else []
    return any(r["step"] == step and any(name.startswith("evaluation/") for name in r) for r in records)


def forget_after(path: Path, step: int) -> None:
    """Remove the records after ``step``: a resumed run writes them anew."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
