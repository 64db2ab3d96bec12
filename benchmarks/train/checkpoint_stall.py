"""What a checkpoint costs the training: an asynchronous save and a synchronous one against no save, in one run.

    python benchmarks/train/checkpoint_stall.py --out benchmarks/results/checkpoint_stall

writes NAME.csv (cost at several intervals) and NAME.json (every measurement and its conditions). About two minutes on
two cores.

A step is forward, backward and update of a student on a fixed batch of random data; no loader runs. In every round a
window of steps without a save and one that begins with an asynchronous save are timed in turn, which comes first
changing from round to round, and a synchronous save by itself.

The *added seconds* of an asynchronous save are all that it costs: the call of `save` (the copy to the host), the time
by which the steps of its window take longer than as many without a save while the writing goes on beside them, and the
call of `finish` (manifest, rename, removal of the oldest). The window ends when nothing is being written any more. The
added seconds of a synchronous save are those of its call. The *cost at every N steps* is added seconds / (N × seconds
of a step without a save); the *stall* is how much longer the one step takes that the save follows: its call alone.

On a CPU the writer takes its time from the cores that compute the steps, which on a GPU it does not: this is the
hardest case, and the copy to the host is one within memory.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import numpy as np
import torch
import tyro

import mmd2v
from mmd2v.config.schema import Config
from mmd2v.config.training import CheckpointConfig
from mmd2v.data.batch import Batch
from mmd2v.data.stream import TrainFacts
from mmd2v.distributed import environment
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.files import atomic_path, check_output, write_json
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.report.machine import processor
from mmd2v.train.checkpoints.manifest import describe
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.engine import Engine, build_engine
from mmd2v.train.module import TrainModule
from mmd2v.train.run_dir import code_version

INTERVALS = (10, 50, 100, 500, 1000)
LIMIT = 0.02  # of the time of the steps: what an asynchronous save may cost


@dataclass(frozen=True)
class Bench:
    """Measure what checkpoints cost."""

    out: Path
    """Path of the results without ending."""
    width: int = 384
    """Width of the student."""
    layers: int = 8
    """Layers of the student."""
    precision: Literal["fp32", "bf16_autocast"] = "fp32"
    """As of engine.precision; bf16 only where the processor has instructions for it."""
    batch_size: int = 8
    """Images of a step, each with a sentence."""
    window: int = 6
    """Fewest steps of a window."""
    rounds: int = 5
    """Rounds of measurement, after a save and two steps that are not counted."""
    folder: Path | None = None
    """Folder on the file system that checkpoints go to; none: the system's for temporary files."""


@dataclass(frozen=True)
class Vocabulary:
    """What the model asks of a tokenizer."""

    vocab_size: int = 30_000
    max_length: int = 32
    cls_id: int = 1
    pad_id: int = 0


@dataclass
class Round:
    """Seconds measured in one round."""

    step: float
    """A step without a save, mean of its window."""
    call: float
    """The call of `save`, asynchronous."""
    finish: float
    """The call of `finish`, when nothing was left to write."""
    window_steps: int
    """Steps that began or ran while files were written, and those up to the length of a window."""
    slower: float
    """By which these steps took longer than as many without a save."""
    added: float
    """call + slower + finish."""
    synchronous: float
    """The call of a synchronous save."""


def main(argv: Sequence[str]) -> int:
    """Measure, print and write."""
    options = tyro.cli(Bench, args=list(argv), description=__doc__)
    csv_file, json_file = (options.out.with_suffix(ending) for ending in (".csv", ".json"))
    for file in (csv_file, json_file):
        check_output("--out", file)
    world = environment.initialize("cpu")
    torch.manual_seed(0)
    config = _config(options)
    engine, step = _training(config, world, options.batch_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rounds, size = _measure(options, config, engine, step, world, Path(folder))
    parameters = sum(p.numel() for p in engine.module.parameters())
    summary = _summary(rounds)
    costs = _costs(summary)
    _print(summary, costs, parameters, size)
    with atomic_path(csv_file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(costs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(costs)
    conditions = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before(1 min)": os.getloadavg()[0],
        "torch": torch.__version__,
        "mmd2v": mmd2v.__version__,
        "commit": code_version(),
        "parameters": parameters,
        "checkpoint(bytes)": size,
        "zero_stage": config.engine.zero_stage,
        **{key: value for key, value in asdict(options).items() if key not in ("out", "folder")},
    }
    write_json(
        json_file,
        {"conditions": conditions, "median": summary, "costs": costs, "rounds": [asdict(one) for one in rounds]},
    )
    return 0


def _config(options: Bench) -> Config:
    return Config.model_validate(
        {
            "name": "checkpoint-stall",
            "run_dir": "unused",
            "steps": 1,
            "data": {
                "train": {"shards": "unused"},
                "image": {"size": 64},
                "tokenizer": {"path": "unused", "max_length": Vocabulary().max_length},
            },
            "model": {
                "width": options.width,
                "heads": max(1, options.width // 64),
                "encoders": {"image": {"kind": "patch", "patch_size": 8}, "text": {"kind": "tokens"}},
                "layers": [{"kind": "shared", "count": options.layers}],
            },
            "objectives": [{"kind": "contrastive"}],
            "optimizer": {"name": "adamw"},
            "engine": {
                "device": "cpu",
                "batch_size": options.batch_size,
                "zero_stage": 1,
                "precision": options.precision,
            },
        }
    )


def _training(config: Config, world: World, batch_size: int) -> tuple[Engine, Callable[[], None]]:
    """Return the engine and a function that does one step."""
    student = build_student(config, Vocabulary())  # type: ignore[arg-type] - all that a model asks of one
    autocast = config.engine.precision == "bf16_autocast"
    engine = build_engine(config, world, TrainModule(student, build_objectives(config, student, {}), autocast))
    batch = _batch(batch_size)

    def step() -> None:
        losses = engine.forward(batch, {})
        engine.backward(losses["loss"])
        engine.step()

    return engine, step


def _batch(size: int) -> Batch:
    random = np.random.default_rng(0)
    tokens = Vocabulary()
    lengths_N = random.integers(8, tokens.max_length, size)
    return Batch(
        images=torch.from_numpy(random.integers(0, 256, (size, 3, 64, 64), dtype=np.uint8)),
        text_ids=torch.from_numpy(random.integers(2, tokens.vocab_size, lengths_N.sum()).astype(np.int32)),
        text_lengths=torch.from_numpy(lengths_N.astype(np.int32)),
        caption_image=torch.arange(size),
        sample_ids=tuple(f"sample-{i}" for i in range(size)),
    )


# ----------------------------------------------------------------------------------------- measuring


def _measure(
    options: Bench, config: Config, engine: Engine, step: Callable[[], None], world: World, folder: Path
) -> tuple[list[Round], int]:
    """Return the rounds, and the bytes of a checkpoint."""
    kinds = {name: CheckpointConfig(asynchronous=name == "asynchronous") for name in ("asynchronous", "synchronous")}
    savers = {name: Checkpointer(folder / name, settings, world) for name, settings in kinds.items()}
    count = 0

    def save(kind: str) -> Path:
        nonlocal count
        count += 1
        return savers[kind].save(engine, describe(engine, config, world, count, count, TrainFacts(1, "none")))

    for _ in range(2):
        step()
    path = save("asynchronous")  # pays once for the memory of the copies
    savers["asynchronous"].finish()
    size = sum(file.stat().st_size for file in path.iterdir())

    rounds = []
    for number in range(options.rounds):
        windows: dict[bool, Any] = {}
        for saves in (number % 2 == 0, number % 2 == 1):
            if saves:
                windows[True] = _window_with_save(options.window, step, save, savers["asynchronous"])
            else:
                windows[False] = _seconds(lambda: [step() for _ in range(options.window)]) / options.window
        quiet = windows[False]
        call, steps, during, finish = windows[True]
        slower = during - steps * quiet
        synchronous = _seconds(lambda: save("synchronous"))
        print(
            f"round {number + 1} of {options.rounds}: a step {quiet:.2f} s, the call of save {call:.2f} s", flush=True
        )
        rounds.append(Round(quiet, call, finish, steps, slower, call + slower + finish, synchronous))
        step()  # what a save leaves in caches and queues belongs to no window
    return rounds, size


def _window_with_save(
    least: int, step: Callable[[], None], save: Callable[[str], Path], saver: Checkpointer
) -> tuple[float, int, float, float]:
    """Seconds of the save's call, steps until all is written, their seconds, seconds of the call that ends it."""
    call = _seconds(lambda: save("asynchronous"))
    steps, start = 0, time.perf_counter()
    while steps < least or saver.busy:
        step()
        steps += 1
    during = time.perf_counter() - start
    return call, steps, during, _seconds(saver.finish)


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------- reporting


def _summary(rounds: list[Round]) -> dict[str, float]:
    """Medians over the rounds, and the range of what is added."""
    values = {f"{name}(s)": median(getattr(one, name) for one in rounds) for name in asdict(rounds[0])}
    values["window_steps"] = values.pop("window_steps(s)")
    added = [one.added for one in rounds]
    step = values["step(s)"]
    return values | {
        "added, mean(s)": mean(added),
        "added, least(s)": min(added),
        "added, most(s)": max(added),
        "stall of a step, asynchronous(%)": 100 * values["call(s)"] / step,
        "stall of a step, synchronous(%)": 100 * values["synchronous(s)"] / step,
        "shortest interval below the limit, asynchronous(steps)": values["added(s)"] / (LIMIT * step),
        "shortest interval below the limit, synchronous(steps)": values["synchronous(s)"] / (LIMIT * step),
        "shortest interval below the limit, asynchronous(s)": values["added(s)"] / LIMIT,
    }


def _costs(summary: dict[str, float]) -> list[dict[str, Any]]:
    step = summary["step(s)"]
    return [
        {
            "every_steps": every,
            "seconds_between": round(every * step, 2),
            "asynchronous_percent": round(100 * summary["added(s)"] / (every * step), 3),
            "asynchronous_percent_most": round(100 * summary["added, most(s)"] / (every * step), 3),
            "synchronous_percent": round(100 * summary["synchronous(s)"] / (every * step), 3),
        }
        for every in INTERVALS
    ]


def _print(summary: dict[str, float], costs: list[dict[str, Any]], parameters: int, size: int) -> None:
    print(f"{parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB a checkpoint")
    for name, value in summary.items():
        print(f"  {name:58} {value:10.3f}")
    print(f"\n{'every':>6} {'seconds':>9} {'asynchronous':>13} {'(most)':>9} {'synchronous':>12}")
    for row in costs:
        every, seconds, ours, most, synchronous = row.values()
        print(f"{every:6} {seconds:9.1f} {ours:12.2f}% {most:8.2f}% {synchronous:11.2f}%")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
