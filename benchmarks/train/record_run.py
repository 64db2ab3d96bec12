"""Turn a finished run into committed results: a table, a curve and the conditions they were measured under.

    python benchmarks/train/record_run.py RUN --out benchmarks/results/NAME

writes NAME.csv (recall at every evaluation), NAME.svg (loss and recall over steps) and NAME.json (final recall,
wall time, machine, versions, commit, resolved config).
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tyro
import yaml

from mmd2v.errors import UserError
from mmd2v.evaluation.retrieval import RECALL_AT
from mmd2v.files import atomic_path, write_json
from mmd2v.report.machine import processor
from mmd2v.train.metrics import METRICS_FILE, read_metrics
from mmd2v.train.run_dir import CONFIG_FILE, ENVIRONMENT_FILE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
PREFIX = "evaluation/"


@dataclass(frozen=True)
class Record:
    """Record a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Path of the results without ending."""
    wall_minutes: float | None = None
    """Whole wall time of the command, in minutes, measured from outside."""


def main(argv: Sequence[str]) -> int:
    """Write the three files."""
    options = tyro.cli(Record, args=list(argv))
    records = read_metrics(options.run / METRICS_FILE)
    recalls = [r for r in records if f"{PREFIX}i2t_R@1" in r]
    losses = [r for r in records if "loss" in r]
    if not recalls or not losses:
        raise UserError(f"{options.run}: holds no recall or no losses")
    write_csv(options.out.with_suffix(".csv"), recalls)
    draw(options.out.with_suffix(".svg"), losses, recalls, options.out.name)
    write_json(options.out.with_suffix(".json"), conditions(options, recalls[-1], losses))
    return 0


def write_csv(path: Path, recalls: list[dict[str, Any]]) -> None:
    """One row an evaluation, in percent."""
    names = [f"{direction}_R@{k}" for direction in DIRECTIONS for k in RECALL_AT]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *names])
        for record in recalls:
            writer.writerow([record["step"], *(f"{100 * record[PREFIX + name]:.2f}" for name in names)])


def draw(path: Path, losses: list[dict[str, Any]], recalls: list[dict[str, Any]], title: str) -> None:
    """Every loss term on the left, R@1 of both directions on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name in sorted({key for record in losses for key in record if key.startswith("loss/")}):
        rows = [r for r in losses if name in r]
        left.plot([r["step"] for r in rows], [r[name] for r in rows], label=name.removeprefix("loss/"))
    left.set(xlabel="step", ylabel="loss (unweighted)", ylim=(0, None))
    steps = [r["step"] for r in recalls]
    for direction, label in DIRECTIONS.items():
        right.plot(steps, [100 * r[f"{PREFIX}{direction}_R@1"] for r in recalls], marker="o", label=f"{label} R@1")
    right.set(xlabel="step", ylabel="recall (%)", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def conditions(options: Record, final: dict[str, Any], losses: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader must know to trust or repeat the numbers."""
    return {
        "final": {key.removeprefix(PREFIX): value for key, value in final.items()},
        "throughput(samples/s)": sorted(r["throughput(samples/s)"] for r in losses)[len(losses) // 2],
        "wall(min)": options.wall_minutes,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "environment": json.loads((options.run / ENVIRONMENT_FILE).read_text(encoding="utf-8")),
        "config": without_paths(yaml.safe_load((options.run / CONFIG_FILE).read_text(encoding="utf-8"))),
    }


def without_paths(value: Any) -> Any:
    """Replace the folders of absolute paths: they belong to the machine and not to the result."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        kind, separator, path = value.rpartition(":")
        return f"{kind}{separator}{Path(path).name}" if path.startswith("/") else value
    return value


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
