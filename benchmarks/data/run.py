"""Samples a second and core of mmd2v's loader against open_clip's own, on the same shards in the same run.

    benchmarks/data/peer_environment.sh /tmp/peer          # once, under a minute
    MMD2V_SHARED=… python benchmarks/data/run.py --peer-python /tmp/peer/bin/python \
        --out benchmarks/results/data_loader.csv

writes the CSV (a row a measurement), beside it a .json (conditions and ratios) and a .svg. About seven minutes.

Each loader runs with one worker; its two processes share one core, so that everything a loader costs is counted: the
worker's work, handing the batch over, and taking it. Rounds are interleaved. Both make 224-px images by a bicubic,
antialiased random resized crop of 90 to 100 % of the area, CLIP's byte pairs of one caption cut at 77 tokens, and
batches of 64. What differs by design: open_clip decodes and resizes with PIL, has no flip in its training transform
(mmd2v flips half of the images) and gives normalised fp32 images and padded int64 tokens; mmd2v gives uint8 images,
which the device normalises, and packed int32 tokens. `per_cpu_second` counts processor time instead of wall time and
suffers less from other programs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib
import torch
import torchvision
import tyro
from shard_sets import clip_tokenizer, make_sets

import mmd2v
from mmd2v.errors import UserError
from mmd2v.files import atomic_path, check_output, write_json, write_text
from mmd2v.progress import Progress
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
HEADER = "what,provider,stage,shards,unit,rounds,p50,p20,p80,per_cpu_second,share_of_bare_decode,"
HEADER += "processor,python,torch,torchvision,open_clip,mmd2v,commit"
SIZE, BATCH = 224, 64
RATE = "samples/s"
PASSES, PASS_SAMPLES = 20, 640
DEEP = 3.95  # epochs after which a loader resumes
LABELS = {
    ("loader", "mmd2v"): "mmd2v, whole loader",
    ("loader", "open_clip"): "open_clip, whole loader",
    ("stage", "torchvision"): "torchvision, decoding alone",
    ("stage", "PIL"): "PIL, decode + open_clip's transform",
}


@dataclass(frozen=True)
class Options:
    """Measure mmd2v's loader against open_clip's."""

    peer_python: Path
    """Python of the environment that peer_environment.sh made."""
    out: Path
    """CSV file to write; a .json and a .svg come beside it."""
    rounds: int = 5
    """Measurements of each kind, interleaved."""
    seconds: float = 6.0
    """Of one measurement of a loader; stages take a third of it."""
    sets: tuple[str, ...] = ("500px", "160px")
    """Shard sets to measure on."""
    core: int | None = None
    """Core to measure on; by default the last one this process may use."""


class Child:
    """One of the measured processes, bound to one core. Use as a context manager."""

    def __init__(self, command: Sequence[str], core: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        os.sched_setaffinity(self.process.pid, {core})  # its children inherit it
        self.command = command
        self.answer()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise UserError(f"{Path(self.command[1]).name} failed: {self.errors.read()[-2000:]}")
        return json.loads(line)

    def __call__(self, operation: str, **arguments: Any) -> Any:
        print(json.dumps({"operation": operation, **arguments}), file=self.process.stdin, flush=True)
        return self.answer()


class Results:
    """Values of every measurement, by (what, provider, stage, shards, unit)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.per_processor: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def rate(self, key: tuple[str, ...], measured: Sequence[float]) -> None:
        samples, seconds, processor_time = measured
        self.values[(*key, RATE)].append(samples / seconds)
        self.per_processor[(*key, RATE)].append(samples / max(processor_time, 1e-9))

    def add(self, key: tuple[str, ...], unit: str, value: float) -> None:
        self.values[(*key, unit)].append(value)

    def bare(self, shards: str) -> float:
        return median(self.values["stage", "torchvision", "decode", shards, RATE])

    def rows(self, machine: Sequence[str]) -> list[list[Any]]:
        made = []
        for key, values in self.values.items():
            spread = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
            numbers = [f"{number:.6g}" for number in (median(values), spread[0], spread[3])]
            of_processor = f"{median(self.per_processor[key]):.6g}" if key in self.per_processor else ""
            share = f"{median(values) / self.bare(key[3]):.4f}" if key[4] == RATE else ""
            made.append([*key, len(values), *numbers, of_processor, share, *machine])
        return made


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=list(argv), description=__doc__)
    if options.rounds < 1 or not options.seconds > 0:
        raise UserError(f"--rounds, --seconds: found {options.rounds}, {options.seconds:g}, expected more than 0")
    if not options.peer_python.is_file():
        raise UserError(f"--peer-python: {options.peer_python} not found; make it with {HERE.name}/peer_environment.sh")
    if "MMD2V_SHARED" not in os.environ:
        raise UserError("MMD2V_SHARED: unset, expected the folder that holds data/flickr8k and data/tokenizers")
    check_output("--out", options.out)
    shared = Path(os.environ["MMD2V_SHARED"])
    core = max(os.sched_getaffinity(0)) if options.core is None else options.core
    results = Results()
    with tempfile.TemporaryDirectory() as work:
        folders = make_sets(shared, Path(work))
        merges = shared / "data/tokenizers/clip_bpe/bpe_simple_vocab_16e6.txt.gz"
        tokenizer = clip_tokenizer(merges, Path(work) / "tokenizer.json")
        texts = captions(shared)
        with Progress("measuring", options.rounds * len(options.sets), unit="rounds") as progress:
            for name in options.sets:
                versions = measure(options, core, name, folders[name], tokenizer, texts, results, progress)
    machine = [processor(), platform.python_version(), torch.__version__, torchvision.__version__]
    machine += [versions["open_clip"], mmd2v.__version__, str(code_version())]
    write_csv(options.out, results.rows(machine))
    write_json(options.out.with_suffix(".json"), summary(options, results, machine, versions))
    draw(options.out.with_suffix(".svg"), results, options.sets, machine)
    print(table(results, options.sets))
    return 0


def captions(shared: Path) -> list[str]:
    entries = json.loads((shared / "data/flickr8k/flickr8k_val.json").read_text(encoding="utf-8"))
    return [entry["caption"][0] for entry in entries]


def measure(
    options: Options,
    core: int,
    name: str,
    folder: Path,
    tokenizer: Path,
    texts: list[str],
    results: Results,
    progress: Progress,
) -> dict[str, str]:
    """Add all measurements on one shard set; return the versions of the peer."""
    size = [str(SIZE), str(BATCH)]
    with ExitStack() as stack:
        ours = stack.enter_context(
            Child([sys.executable, str(HERE / "ours.py"), str(folder), str(tokenizer), *size], core)
        )
        peer = stack.enter_context(Child([str(options.peer_python), str(HERE / "peer.py"), str(folder), *size], core))
        versions = peer("versions")
        if ours("tokens", texts=texts) != peer("tokens", texts=texts):
            raise UserError("the two tokenizers give different ids: the comparison would not be fair")
        for provider, child in (("mmd2v", ours), ("open_clip", peer)):
            child("first_batch")  # the first loader of a process pays for its imports
            for _ in range(3):
                results.add(("first batch", provider, "whole loader", name), "s", child("first_batch"))
        for _ in range(3):
            resumed = ours("first_batch", epochs=DEEP)
            results.add(("first batch", "mmd2v", f"resumed after {DEEP} epochs", name), "s", resumed)
        short = options.seconds / 3
        for _ in range(options.rounds):
            results.rate(("loader", "mmd2v", "whole loader", name), ours("loader", seconds=options.seconds))
            results.rate(("loader", "open_clip", "whole loader", name), peer("loader", seconds=options.seconds))
            results.rate(("stage", "torchvision", "decode", name), ours("bare_decode", seconds=short))
            results.rate(("stage", "PIL", "decode + crop + normalise", name), peer("pil", seconds=short))
            times = ours("stages", seconds=short)
            for stage, spent in times["seconds"].items():
                results.add(("stage", "mmd2v", stage, name), RATE, times["samples"] / spent)
            spent = times["seconds"]["decode"] + times["seconds"]["crop"]
            results.add(("stage", "mmd2v", "decode + crop", name), RATE, times["samples"] / spent)
            # What is left of the loader's time: handing a batch from one process to the other, and its bookkeeping.
            whole = 1 / results.values["loader", "mmd2v", "whole loader", name, RATE][-1]
            rest = whole - sum(times["seconds"].values()) / times["samples"]
            results.add(("stage", "mmd2v", "collate and hand over", name), "us/sample", 1e6 * rest)
            progress.advance()
        memory = ours("memory", passes=PASSES, samples=PASS_SAMPLES)
        for place in (1, PASSES - 1):
            key = ("memory", "mmd2v", f"after {place + 1} passes over {PASS_SAMPLES} samples", name)
            results.add(key, "MB", memory[place])
    return versions


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(HEADER.split(","))
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary(options: Options, results: Results, machine: Sequence[str], versions: dict[str, str]) -> dict[str, Any]:
    by_set = {}
    for name in options.sets:
        ratios = {}
        for clock, values in (("", results.values), (" by processor time", results.per_processor)):
            ours, peer = (median(values["loader", who, "whole loader", name, RATE]) for who in ("mmd2v", "open_clip"))
            bare = median(values["stage", "torchvision", "decode", name, RATE])
            ratios[f"mmd2v / open_clip{clock}"] = round(ours / peer, 3)
            ratios[f"mmd2v / bare decode{clock}"] = round(ours / bare, 3)
            ratios[f"open_clip / bare decode{clock}"] = round(peer / bare, 3)
        before, after = (
            results.values["memory", "mmd2v", f"after {n} passes over {PASS_SAMPLES} samples", name, "MB"][0]
            for n in (2, PASSES)
        )
        by_set[name] = {**ratios, f"memory after {PASSES} passes / after 2": round(after / before, 4)}
    return {
        "result": by_set,
        "settings": {
            "size": SIZE,
            "batch": BATCH,
            "crop_scale": [0.9, 1.0],
            "interpolation": "bicubic",
            "flip": {"mmd2v": 0.5, "open_clip": 0.0},
            "tokens": "CLIP byte pairs, at most 77, equal ids for both",
            "output": {
                "mmd2v": "uint8 images, packed int32 ids",
                "open_clip": "normalised fp32 images, padded int64 ids",
            },
            "workers": 1,
            "cores": 1,
            "rounds": options.rounds,
            "seconds": options.seconds,
        },
        "processor": machine[0],
        "versions": {"python": machine[1], "mmd2v": machine[5], "commit": machine[6], **versions},
    }


def draw(path: Path, results: Results, sets: Sequence[str], machine: Sequence[str]) -> None:
    """A bar a loader and a bare decoder, with the spread of the rounds; one panel a shard set."""
    figure, panels = plt.subplots(1, len(sets), figsize=(5 * len(sets), 2.6), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], sets, strict=True):
        keys = {key[:2]: values for key, values in results.values.items() if key[3:] == (name, RATE)}
        rows = [(LABELS[pair], keys[pair], pair[0]) for pair in LABELS if pair != ("loader", "mmd2v")]
        rows.append((LABELS["loader", "mmd2v"], keys["loader", "mmd2v"], "loader"))
        for place, (_, values, what) in enumerate(sorted(rows, key=lambda row: median(row[1]))):
            low, high = quantiles(values, n=5, method="inclusive")[::3] if len(values) > 1 else [values[0]] * 2
            middle = median(values)
            error = [[middle - low], [high - middle]]
            axes.barh(place, middle, color="C0" if what == "loader" else "0.75", xerr=error, capsize=3)
            axes.text(middle, place + 0.3, f" {middle:,.0f}", va="center", ha="left", fontsize=8)
        axes.set_yticks(range(len(rows)), [label for label, *_ in sorted(rows, key=lambda row: median(row[1]))])
        axes.set(xlabel="samples/s on one core", title=f"Flickr8k, {name}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine[0], fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def table(results: Results, sets: Sequence[str]) -> str:
    lines = []
    for name in sets:
        lines.append(f"{name}:")
        for key, values in results.values.items():
            if key[3] == name:
                line = f"  {key[0]:<12} {key[1]:<12} {key[2]:<34} {median(values):>10,.1f} {key[4]}"
                timed = results.per_processor.get(key)
                lines.append(line + (f" ({median(timed):,.1f} a second of processor time)" if timed else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
