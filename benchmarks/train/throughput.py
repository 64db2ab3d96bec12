"""Training throughput beside recall: configs of mmd2v against open_clip's own training, on the same shards, in one run.

    benchmarks/data/peer_environment.sh /tmp/peer          # once, under a minute
    FLICKR8K_SHARDS=… MMD2V_TEACHERS=… python benchmarks/train/throughput.py \\
        configs/throughput/contrastive.yaml configs/throughput/distilled.yaml \\
        --peer-python /tmp/peer/bin/python --out benchmarks/results/throughput_cpu

trains each config for N steps and evaluates it, and writes NAME.csv (a row a config), NAME.json (every window and its
conditions) and NAME.svg. Any key of the configs can be set as with `mmd2v train`: `--engine.device cuda
--engine.precision bf16_autocast` measures on a GPU. Without --peer-python the configs are measured alone.

What runs. Every config is a run of `mmd2v train`: its loop, loader, engine, teachers and final evaluation. The peer is
open_clip in a process and an environment of its own: `create_model`, `get_wds_dataset`, and `train_one_epoch` with its
AdamW and cosine schedule. Its model has the size of the first config: width, heads and layers of both towers, patch and
image size, context and embedding (--peer-model takes one of open_clip's own instead). All have the same threads,
loader workers, batch size, precision, learning rate, shards (repacked to one caption an image, which is what open_clip
reads) and vocabulary, which is checked to give the same ids.

What differs. open_clip pads every text to the context and hides what follows a token; mmd2v packs the texts' real
tokens, each of which sees its whole text. open_clip decodes with PIL into normalised fp32 images, mmd2v with
torchvision into uint8 ones. Both have torch's AdamW, mmd2v the fused one. open_clip has a LayerNorm more before the
image tower. A config with a teacher does work that the peer does not: a contrastive config is like for like, and comes
first.

How. The processes take turns, a window of steps each, in an order that turns round from round to round; one that waits
does nothing. A window's first steps use up what loaders made in the pause and are not counted. Rates are medians over
the windows, the spread is (largest − smallest) / median. *Data* is the time in which the trainer waits for a batch,
*teacher* that of the teachers' forward passes (on a GPU by events), *student* all the rest. *Tokens* enter the layers:
of patches and CLS, and of texts without padding. *Memory* is the peak of a counted window: on a GPU the allocator's, on
a CPU the training process's own. Recall is that of the held-out set after all N steps.

*MFU* is the rate of floating-point operations of the whole step (student and teachers, what is computed on padding
too) over that of a bare product of two square matrices of the run's dtype (up to 2,048 rows; on a GPU 8,192), measured
by the same process before each window. Operations are counted by torch's FlopCounterMode on one step, in which
attention is computed as plain products so that they are seen. In bf16 on a processor without instructions for it, whose
products are slow, the ratio tells nothing and can pass 100 %.
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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro
from tyro.conf import Positional, arg

import mmd2v
from mmd2v.config.load import dump_config, load_config
from mmd2v.config.overrides import split_overrides
from mmd2v.config.schema import Config
from mmd2v.data.damage import Damage
from mmd2v.data.shards import RawSample, ShardSet
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.distributed.environment import World, choose_device
from mmd2v.errors import UserError
from mmd2v.evaluation.retrieval import RECALL_AT, retrieval_metrics
from mmd2v.files import atomic_path, check_output, write_json, write_text
from mmd2v.progress import Progress
from mmd2v.report.machine import processor
from mmd2v.train.precision import resolve_precision
from mmd2v.train.run_dir import code_version

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "data"))
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of the backend
from shard_sets import clip_tokenizer, write_set  # noqa: E402 - of the loader's benchmarks

FLAGS = ("--out", "--steps", "--rounds", "--uncounted", "--threads", "--peer-python", "--peer-model", "--scale")
RECALLS = [f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in RECALL_AT]
VOCABULARY = 49_408  # CLIP's
PARTS = ("data", "teacher", "student")
PEER = "open_clip"


@dataclass(frozen=True)
class Options:
    """Measure how fast configs train, and what they have learned."""

    configs: Positional[tuple[Path, ...]]
    """Configs of runs; the peer has the size of the first."""
    out: Path
    """Path of the results without ending."""
    steps: int = 102
    """Steps that each is trained for: one to warm up (and what is left over), one in which operations are counted, the
    windows, and one."""
    rounds: int = 5
    """Windows of each."""
    uncounted: int = 3
    """Steps at the beginning of a window that are not measured."""
    threads: int = max(1, len(os.sched_getaffinity(0)) - 1)
    """Threads of each trainer. By default the loader has a core of its own: threads wait for each other, and one that
    shares its core holds up all."""
    peer_python: Path | None = None
    """Python of the environment that benchmarks/data/peer_environment.sh made; none: no peer."""
    peer_model: Annotated[str | None, arg(metavar="NAME")] = None
    """One of open_clip's own models, such as ViT-B-16, instead of one of the first config's size."""
    scale: Annotated[str | None, arg(metavar="NAME")] = None
    """One of the configs' `scales`."""

    @property
    def window(self) -> int:
        """Steps of a window."""
        return (self.steps - 3) // self.rounds

    def check(self) -> None:
        """Raise UserError for numbers that leave nothing to measure."""
        if self.rounds < 1 or self.uncounted < 0 or self.window <= self.uncounted:
            raise UserError(
                f"--steps: found {self.steps} for {self.rounds} windows, of each of which {self.uncounted} steps are "
                f"not counted; expected at least {3 + max(1, self.rounds) * (self.uncounted + 1)}"
            )
        if not self.configs:
            raise UserError("expected a config")
        if self.peer_python is not None and not self.peer_python.is_file():
            raise UserError(
                f"--peer-python: {self.peer_python} not found; make it with benchmarks/data/peer_environment.sh"
            )


@dataclass
class Measured:
    """All that is known of one trainer."""

    name: str
    provider: str
    config: Config
    about: dict[str, Any] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    windows: list[dict[str, float]] = field(default_factory=list)
    recall: dict[str, float] = field(default_factory=dict)

    def rates(self, what: str) -> list[float]:
        """``samples`` or ``tokens`` a second, in every window."""
        return [window[what] / window["seconds"] for window in self.windows]

    @property
    def flops(self) -> float:
        """Operations of a sample, the teachers' included."""
        return self.count["flops"] / self.count["samples"]

    def share(self, part: str) -> float:
        """Median over the windows of the fraction of time in a part of a step."""
        shares = [
            {"student": 1 - (window["data"] + window["teacher"]) / window["seconds"]}.get(
                part, window.get(part, 0.0) / window["seconds"]
            )
            for window in self.windows
        ]
        return median(shares)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median of the rates."""
        rates = self.rates("samples")
        return (max(rates) - min(rates)) / median(rates)

    def row(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """A line of the table."""
        rates = self.rates("samples")
        utilisation = [rate * self.flops / w["product"] for rate, w in zip(rates, self.windows, strict=True)]
        return {
            "config": self.name,
            "provider": self.provider,
            "device": machine["device"],
            "precision": self.config.engine.precision,
            "batch": self.config.engine.batch_size,
            "steps": self.config.steps,
            "samples_per_s": f"{median(rates):.5g}",
            "samples_per_s_min": f"{min(rates):.5g}",
            "samples_per_s_max": f"{max(rates):.5g}",
            "tokens_per_s": f"{median(self.rates('tokens')):.5g}",
            "gflop_per_sample": f"{self.flops / 1e9:.4g}",
            "teacher_gflop_per_sample": f"{self.count['teacher_flops'] / self.count['samples'] / 1e9:.4g}",
            "product_gflop_per_s": f"{median(w['product'] for w in self.windows) / 1e9:.4g}",
            "mfu_percent": f"{100 * median(utilisation):.1f}",
            **{f"{part}_percent": f"{100 * self.share(part):.1f}" for part in PARTS},
            "peak_memory_mb": f"{max(w['peak'] for w in self.windows) / 1e6:.0f}",
            **{f"{name}_percent": _percent(self.recall.get(name)) for name in RECALLS},
            **{f"chance_{name}_percent": _percent(self.recall.get(f"chance_{name}")) for name in RECALLS[2::3]},
            "parameters": self.about["parameters"],
            "teacher_parameters": self.about["teacher_parameters"],
            **machine,
        }


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


class Child:
    """A trainer in a process of its own. A context manager."""

    def __init__(self, python: str | Path, script: str, argument: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if python == sys.executable:
            paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.script = script
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [str(python), str(HERE / script), str(argument), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self._answer()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()  # it leaves, and ends its loader's processes
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise UserError(f"{self.script} failed: {self.errors.read()[-3000:]}")
        return json.loads(line)

    def __call__(self, operation: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer tells why
            print(json.dumps({"operation": operation, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()


def main(argv: Sequence[str]) -> int:
    """Measure, print and write."""
    own, overrides = split_overrides(argv, {**dict.fromkeys(FLAGS, True), "--help": False})
    options = tyro.cli(Options, args=own, description=__doc__)
    options.check()
    files = {ending: options.out.with_suffix(f".{ending}") for ending in ("csv", "json", "svg")}
    for file in files.values():
        check_output("--out", file)
    configs = [_with_precision(load_config(path, overrides, options.scale)) for path in options.configs]
    with tempfile.TemporaryDirectory() as work:
        measured, versions = measure(options, configs, Path(work))
    machine = {
        "device": _device(configs[0]),
        "threads": options.threads,
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": versions.get("open_clip", ""),
        "mmd2v": mmd2v.__version__,
        "commit": code_version(),
    }
    rows = [one.row(machine) for one in measured]
    write_csv(files["csv"], rows)
    write_json(files["json"], record(options, overrides, measured, machine, versions))
    draw(files["svg"], measured, machine)
    print(table(measured, rows))
    return 0


def _on_cuda(config: Config) -> bool:
    return choose_device(config.engine.device) == "cuda"


def _device(config: Config) -> str:
    return torch.cuda.get_device_name() if _on_cuda(config) else "cpu"


def _with_precision(config: Config) -> Config:
    """Name the precision that the run will take by itself: the peer and the table have to know it."""
    device = torch.device("cuda" if _on_cuda(config) else "cpu")
    return resolve_precision(config, World(0, 1, 0, device, "gloo"))[0]


# ----------------------------------------------------------------------------------------- what is measured


def measure(options: Options, configs: list[Config], work: Path) -> tuple[list[Measured], dict[str, str]]:
    """Train all of them; return what was measured, and the versions of the peer's libraries."""
    held_out: list[RawSample] = []
    changes: dict[str, Any] = {}
    if options.peer_python is not None:
        first = configs[0]
        shards = ShardSet(first.data.train.shards)
        count = max(8, first.data.workers)
        samples = [(f"{n:07d}", one.image, one.captions[0]) for n, one in enumerate(_samples(shards))]
        write_set(work / "train", samples, count)
        held_out = list(_samples(ShardSet(first.data.eval.shards))) if first.data.eval is not None else []
        changes = {"shards": str(work / "train"), "tokenizer": str(_vocabulary(options.peer_python, work))}
    configs = [measured_config(config, options.steps, work / f"run{n}", changes) for n, config in enumerate(configs)]

    with ExitStack() as stack:
        children: list[tuple[Measured, Child]] = []
        if options.peer_python is not None:
            write_json(file := work / "peer.json", peer_settings(configs[0], options, work))
            peer = stack.enter_context(Child(options.peer_python, "throughput_peer.py", file, options.threads))
            _check_tokens(configs[0], peer, [caption for *_, caption in samples[:256]])
        for number, config in enumerate(configs):
            write_text(file := work / f"config{number}.yaml", dump_config(config))
            child = stack.enter_context(Child(sys.executable, "throughput_ours.py", file, options.threads))
            children.append((Measured(config.name, "mmd2v", config), child))
        if options.peer_python is not None:
            # Beside the config that it is compared with.
            name = options.peer_model or f"the size of {configs[0].name}"
            children.insert(1, (Measured(name, PEER, configs[0]), peer))
        take_turns(options, children)
        for one, child in children:
            if one.provider == PEER:
                one.recall = _peer_recall(child, held_out, work)
            else:
                one.recall = child("finish")
    versions = next((one.about["versions"] for one, _ in children if one.provider == PEER), {})
    return [one for one, _ in children], versions


def take_turns(options: Options, children: list[tuple[Measured, Child]]) -> None:
    """Fill in the windows."""
    left_over = options.steps - 2 - options.rounds * options.window
    with Progress("measuring", options.rounds * len(children), unit="windows") as progress:
        for one, child in children:
            one.about = child("describe")
            child("window", steps=left_over, uncounted=0)
            one.count = child("count")
        for number in range(options.rounds):
            for one, child in children if number % 2 == 0 else reversed(children):
                product = child("product")
                window = child("window", steps=options.window, uncounted=options.uncounted)
                one.windows.append({**window, "product": product})
                progress.advance()


def measured_config(config: Config, steps: int, run_dir: Path, changes: Mapping[str, str]) -> Config:
    """Return the config of a run that does nothing between its steps and is evaluated at the end."""
    values = config.model_dump()
    values |= {"steps": steps, "epochs": None, "run_dir": str(run_dir)}
    values["logging"] |= {"every": steps, "tensorboard": False}
    values["checkpoint"] |= {"every": None, "minutes": None}
    values["evaluation"] |= {"every": None, "at_start": False}
    if changes:
        if config.data.tokenizer is None:
            raise UserError(f"{config.name}: has no data.tokenizer; expected images and texts, as open_clip trains on")
        values["data"]["train"] = {"shards": changes["shards"]}
        values["data"]["tokenizer"] = {"path": changes["tokenizer"], "max_length": config.data.tokenizer.max_length}
    return Config.model_validate(values)


def peer_settings(config: Config, options: Options, work: Path) -> dict[str, Any]:
    """Return what the peer needs to train as ``config`` does. Raises UserError where it has nothing like it."""
    model, optimizer, engine = config.model, config.optimizer, config.engine
    encoders = {encoder.input: (name, encoder) for name, encoder in model.encoders.items()}
    kinds = {kind: encoder.kind for kind, (_, encoder) in encoders.items()}
    if kinds != {"image": "patch", "text": "tokens"} or config.data.tokenizer is None:
        raise UserError(
            f"{config.name}: model.encoders are {kinds}, expected patch and tokens: the peer's size is theirs"
        )
    if engine.precision not in ("fp32", "bf16_autocast"):
        raise UserError(f"engine.precision: found {engine.precision}, expected fp32 or bf16_autocast beside the peer")
    if engine.micro_batch_size not in (None, engine.batch_size):
        raise UserError("engine.micro_batch_size: expected none beside the peer, whose step is one batch")
    ratios = {group.mlp_ratio for group in model.layers}
    if len(ratios) != 1:
        raise UserError(f"{config.name}: model.layers have mlp_ratio {sorted(ratios)}, expected one for all")

    def layers(kind: str) -> int:
        name = encoders[kind][0]
        return sum(group.count for group in model.layers if name in (group.modalities or model.encoders))

    form = {
        "embed_dim": model.projection.dim or model.width,
        "vision_cfg": {
            "image_size": config.data.image.size,
            "patch_size": encoders["image"][1].patch_size,
            "layers": layers("image"),
            "width": model.width,
            "head_width": model.width // model.heads,
            "mlp_ratio": ratios.pop(),
        },
        "text_cfg": {
            "context_length": config.data.tokenizer.max_length,
            "vocab_size": VOCABULARY,
            "layers": layers("text"),
            "width": model.width,
            "heads": model.heads,
        },
    }
    form["text_cfg"]["mlp_ratio"] = form["vision_cfg"]["mlp_ratio"]
    shards = sorted((work / "train").glob("*.tar"))
    steps = options.steps
    return {
        "model": options.peer_model or form,
        "folder": str(work),
        "device": "cpu" if _device(config) == "cpu" else "cuda",
        "precision": engine.precision,
        "shards": f"{work}/train/shard-{{000000..{len(shards) - 1:06d}}}.tar",
        "batch_size": engine.batch_size,
        "workers": config.data.workers,
        "steps": steps,
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "clip_norm": optimizer.clip_norm,
        "warmup_steps": round(optimizer.warmup * steps) if optimizer.warmup < 1 else int(optimizer.warmup),
        "crop_scale": config.data.image.crop_scale,
        "mean": config.data.image.mean,
        "std": config.data.image.std,
    }


def _samples(shards: ShardSet) -> Sequence[RawSample]:
    found = []
    for shard, count in enumerate(shards.counts.tolist()):
        for sample in shards.read_many([(shard, row) for row in range(count)]):
            if isinstance(sample, Damage):
                raise sample
            found.append(sample)
    return found


def _vocabulary(python: Path, work: Path) -> Path:
    """Write CLIP's byte pairs, of which open_clip has a copy, as a tokenizer of ours."""
    asked = subprocess.run([python, HERE / "throughput_peer.py", "merges"], capture_output=True, text=True, timeout=300)
    if asked.returncode:
        raise UserError(f"--peer-python: throughput_peer.py failed: {asked.stderr[-2000:]}")
    return clip_tokenizer(Path(asked.stdout.splitlines()[-1]), work / "tokenizer.json")


def _check_tokens(config: Config, child: Child, texts: list[str]) -> None:
    ids, lengths = load_tokenizer(config.data.tokenizer).encode_batch(texts)
    if child("tokens", texts=texts) != [row.tolist() for row in torch.from_numpy(ids).split(lengths.tolist())]:
        raise UserError("the two tokenizers give different ids: the comparison would not be fair")


def _peer_recall(child: Child, samples: Sequence[RawSample], work: Path) -> dict[str, float]:
    if not samples:
        return {}
    (folder := work / "held_out").mkdir()
    images = []
    for number, sample in enumerate(samples):
        (file := folder / f"{number:07d}").write_bytes(sample.image)
        images.append(str(file))
    texts = [caption for sample in samples for caption in sample.captions]
    owner_N = [number for number, sample in enumerate(samples) for _ in sample.captions]
    child("finish", images=images, texts=texts, out=str(work / "embeddings.npz"))
    with np.load(work / "embeddings.npz", allow_pickle=False) as found:
        image_ME, text_NE = (torch.from_numpy(found[name]) for name in ("images", "texts"))
    return retrieval_metrics(image_ME, text_NE, torch.tensor(owner_N))


# ----------------------------------------------------------------------------------------- results


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row a config."""
    writer = csv.DictWriter(text := io.StringIO(), list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def record(
    options: Options,
    overrides: Sequence[str],
    measured: list[Measured],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Every window and its conditions."""
    ratios = {}
    peers = [one for one in measured if one.provider == PEER]
    for one in measured if peers else []:
        if one.provider != PEER:
            # Windows of one round meet the same machine.
            pairs = zip(one.rates("samples"), peers[0].rates("samples"), strict=True)
            ratios[f"{one.name} / {PEER}"] = round(median(ours / theirs for ours, theirs in pairs), 3)
    return {
        "samples/s, ratio of the same round": ratios,
        "settings": {
            "configs": [path.name for path in options.configs],
            "overrides": [text for text in overrides if "/" not in text],
            "steps": options.steps,
            "rounds": options.rounds,
            "window": options.window,
            "uncounted": options.uncounted,
            "workers": measured[0].config.data.workers,
            "image_size": measured[0].config.data.image.size,
        },
        "machine": dict(machine),
        "peer versions": dict(versions),
        "measured": [
            {
                "config": one.name,
                "provider": one.provider,
                "about": one.about,
                "operations of a step": one.count,
                "spread": round(one.spread, 4),
                "windows": one.windows,
                "recall": one.recall,
            }
            for one in measured
        ],
    }


def draw(path: Path, measured: list[Measured], machine: Mapping[str, Any]) -> None:
    """What a sample costs, by part, on the left; recall after the same number of steps on the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.55 * len(measured)), layout="constrained", width_ratios=(3, 2)
    )
    places = range(len(measured))[::-1]
    labels = [f"{one.provider}\n{one.name}" for one in measured]
    starts = [0.0] * len(measured)
    for part, colour in zip(PARTS, ("C2", "C1", "C0"), strict=True):
        widths = [one.share(part) * 1e3 / median(one.rates("samples")) for one in measured]
        left.barh(places, widths, left=starts, label=part, color=colour)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, one, end in zip(places, measured, starts, strict=True):
        rates = one.rates("samples")
        text = f" {median(rates):,.4g} samples/s ({min(rates):,.4g} to {max(rates):,.4g})"
        left.text(end, place, text, va="center", fontsize=8)
    left.set_yticks(places, labels, fontsize=8)
    left.set(xlabel="time of a sample (ms)", xlim=(0, 1.6 * max(starts)))
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=len(PARTS))
    for offset, direction, label in ((0.2, "i2t", "image → text"), (-0.2, "t2i", "text → image")):
        found = [100 * one.recall.get(f"{direction}_R@10", 0.0) for one in measured]
        bars = right.barh([place + offset for place in places], found, 0.38, label=f"{label} R@10")
        right.bar_label(bars, fmt=" %.1f", fontsize=8)
        chance = 100 * measured[0].recall.get(f"chance_{direction}_R@10", 0.0)
        right.axvline(chance, color=bars[0].get_facecolor(), linestyle=":", linewidth=1)
    right.set_yticks([])
    right.set(xlabel=f"recall after {measured[0].config.steps} steps (%), dotted: chance")
    right.margins(x=0.15)
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    figure.suptitle(f"{where}{threads}, {measured[0].config.engine.precision}", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def table(measured: list[Measured], rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = []
    for one, row in zip(measured, rows, strict=True):
        lines.append(
            f"{one.provider}, {one.name}: {row['samples_per_s']} samples/s (spread {100 * one.spread:.0f} %), "
            f"{row['tokens_per_s']} tokens/s, MFU {row['mfu_percent']} %, data {row['data_percent']} %, "
            f"teacher {row['teacher_percent']} %, student {row['student_percent']} %, {row['peak_memory_mb']} MB, "
            f"i2t R@10 {row['i2t_R@10_percent'] or '-'}, t2i R@10 {row['t2i_R@10_percent'] or '-'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
