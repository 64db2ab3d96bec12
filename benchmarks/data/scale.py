"""What the bookkeeping of a very large data set costs one loader process: 10⁹ samples, 1,024 ranks of 8 workers.

    python benchmarks/data/scale.py --out benchmarks/results/data_scale.csv

takes about a minute. The data set is a manifest alone: no shard of it exists, so what is measured is everything but
reading. Each (rank, worker) gets fresh processes, in which time counts from the call that opens the set, imports done:

- start: open the set, build the order;
- first batches: locate this worker's first batches, after the start;
- resume: open the set, build the order and locate the first batch at 95 % of epoch 3 (counted from 0);
- memory: most resident memory of all that above what the imports take.

Exit status 1 when a requirement is missed.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import tyro

import mmd2v
from mmd2v.config.schema import DataConfig
from mmd2v.data.cursor import micro_batches
from mmd2v.data.manifest import ManifestEntry, write_manifest
from mmd2v.data.shards import ShardSet
from mmd2v.data.stream import train_order
from mmd2v.errors import UserError
from mmd2v.files import check_output, write_text
from mmd2v.progress import track
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version

HEADER = "measure,rank,worker,unit,p50,greatest,required,repeats,shards,samples,ranks,workers,micro_batch,window,"
HEADER += "processor,python,numpy,mmd2v,commit"
REQUIRED = {"start": 2.0, "first batches": None, "resume": 5.0, "memory": 200.0}  # seconds; MB
FIRST_BATCHES = 4
MANIFEST = "shards.json"


@dataclass(frozen=True)
class Options:
    """Measure the bookkeeping of a very large data set."""

    out: Path
    """CSV file to write."""
    shards: int = 100_000
    """Shards of the set."""
    samples: int = 10_000
    """Samples of a shard."""
    ranks: int = 1024
    """Processes that train."""
    workers: int = 8
    """Loader processes of each."""
    micro_batch: int = 64
    """Samples of a rank's micro-batch."""
    repeats: int = 3
    """Fresh processes for each (rank, worker)."""


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["probe"]:  # one of the fresh processes
        print(json.dumps(probe(**json.loads(argv[1]))))
        return 0
    options = tyro.cli(Options, args=list(argv), description=__doc__)
    for name in ("shards", "samples", "ranks", "workers", "micro_batch", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(options, name)}, expected at least 1")
    check_output("--out", options.out)
    found: dict[tuple[str, int, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        fake_manifest(Path(folder), options.shards, options.samples)
        pairs = sorted({(0, 0), (options.ranks // 2, options.workers // 2), (options.ranks - 1, options.workers - 1)})
        for rank, worker in track(pairs * options.repeats, "probing", unit="processes"):
            for measure, value in fresh_probe(options, folder, rank, worker).items():
                found.setdefault((measure, rank, worker), []).append(value)
    write_text(options.out, table(options, found))
    missed = 0
    for (measure, rank, worker), values in sorted(found.items()):
        required = REQUIRED[measure]
        bad = required is not None and median(values) > required
        missed += bad
        limit = "" if required is None else f"  (required: at most {required:g}{', MISSED' if bad else ''})"
        print(f"rank {rank:>4} worker {worker}: {measure:<14} {median(values):>9.3f} {unit(measure)}{limit}")
    return 1 if missed else 0


def fake_manifest(folder: Path, shards: int, samples: int) -> None:
    # Sizes and digests as a real manifest has them: they are part of what has to be read.
    entries = {
        f"shard-{n:06d}.tar": ManifestEntry(samples, 130_000 * samples + 512 * n, f"{n:064x}") for n in range(shards)
    }
    write_manifest(folder, entries)


def fresh_probe(options: Options, folder: str, rank: int, worker: int) -> dict[str, float]:
    arguments = {
        "folder": folder,
        "rank": rank,
        "worker": worker,
        "ranks": options.ranks,
        "workers": options.workers,
        "micro_batch": options.micro_batch,
    }
    command = [sys.executable, __file__, "probe", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise UserError(f"rank {rank} worker {worker}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def probe(folder: str, rank: int, worker: int, ranks: int, workers: int, micro_batch: int) -> dict[str, float]:
    """Do, in this process, what one worker does before it reads its first byte."""
    config = DataConfig.model_validate({"train": {"shards": str(Path(folder) / MANIFEST)}, "workers": workers})
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark of memory back to the present
    before = psutil.Process().memory_info().rss
    clock = time.perf_counter

    def positions(start_index: int) -> Any:
        # The tars do not exist: a tolerant set leaves them to be missed when they are read.
        shards = ShardSet(config.train.shards, tolerant=True)
        order = train_order(config, [shards], seed=0, batch=ranks * micro_batch, micro_batch_size=micro_batch)
        share = micro_batches(
            start_index=start_index,
            rank=rank,
            world_size=ranks,
            micro_batch_size=micro_batch,
            first=worker,
            stride=workers,
        )
        return len(shards), ([order[index] for index in indices] for indices in share)

    began = clock()
    total, batches = positions(0)
    opened = clock()
    for batch in islice(batches, FIRST_BATCHES):
        assert len(batch) == micro_batch and batch[0].epoch == 0
    located = clock()
    del batches
    step = ranks * micro_batch
    start_index = int(3.95 * total) // step * step
    resuming = clock()
    _, batches = positions(start_index)
    assert next(batches)[0].epoch in (3, 4)
    resumed = clock()
    highest = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {
        "start": opened - began,
        "first batches": located - opened,
        "resume": resumed - resuming,
        "memory": max(0, highest - before) / 1e6,
    }


def unit(measure: str) -> str:
    return "MB" if measure == "memory" else "s"


def table(options: Options, found: dict[tuple[str, int, int], list[float]]) -> str:
    config = DataConfig.model_validate({"train": {"shards": "."}})
    sizes = [options.shards, options.shards * options.samples, options.ranks, options.workers, options.micro_batch]
    machine = [processor(), platform.python_version(), np.__version__, mmd2v.__version__, code_version()]
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(HEADER.split(","))
    for (measure, rank, worker), values in sorted(found.items()):
        required = "" if REQUIRED[measure] is None else f"{REQUIRED[measure]:g}"
        numbers = [f"{median(values):.4g}", f"{max(values):.4g}", required, len(values)]
        writer.writerow([measure, rank, worker, unit(measure), *numbers, *sizes, config.shuffle_shards, *machine])
    return text.getvalue()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
