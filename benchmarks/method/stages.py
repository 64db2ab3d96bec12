"""What a unimodal stage gains: its student untrained and distilled beside its teacher, on one measurement.

    python benchmarks/method/stages.py text --config configs/cpu/text_stage.yaml --distilled EXPORT \
        --pairs quora.csv --limit 3000 --out benchmarks/results/text_stage
    python benchmarks/method/stages.py image --config configs/cpu/image_stage.yaml --distilled EXPORT \
        --train cifar10/train --test cifar10/test --out benchmarks/results/image_stage

text: the mean of R@1 and R@5 in both directions of text-pair retrieval, mean pooling. The teacher is the config's own
source with as many blocks as it has. image: 10-NN accuracy of the pooled vector; the teacher is the config's own.
Writes NAME.json (conditions and numbers) and NAME.md. MMD2V_TEACHERS and the config's other variables as for training.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from intervals import binomial_half_width
from table import surroundings
from untrained import export_untrained

import mmd2v
from mmd2v.config.load import load_config
from mmd2v.data.batch import Batch
from mmd2v.evaluation.features import image_features, text_features
from mmd2v.evaluation.knn import knn_of_folder
from mmd2v.evaluation.text_pairs import pairs_of_file
from mmd2v.files import check_output, write_json, write_text
from mmd2v.inference import Encoder
from mmd2v.models.teachers import build_teachers


@dataclass
class Text:
    """Text-pair retrieval."""

    config: Path
    """The stage's config."""
    distilled: Path
    """Export of its run."""
    pairs: Path
    """File of sentence pairs."""
    out: Path
    """Path of the results without ending."""
    teacher_blocks: int = 6
    """Blocks of the source."""
    limit: int = 25_000
    """Positive pairs used, the first of the file."""


@dataclass
class Image:
    """k-NN classification."""

    config: Path
    """The stage's config."""
    distilled: Path
    """Export of its run."""
    train: Path
    """Folder of class folders: the memory bank."""
    test: Path
    """Folder of class folders: what is classified."""
    out: Path
    """Path of the results without ending."""
    k: int = 10
    """Neighbours."""


def main(options: Text | Image) -> None:
    """Measure, print and write."""
    check_output("--out", options.out.with_suffix(".json"))
    started = time.perf_counter()
    if isinstance(options, Text):
        rows, title, count = _text_rows(options)
        untrained, distilled, teacher = (row["mean"] for row in rows.values())
        gained = "There is no gap: the teacher is not better than the untrained student."
        if teacher > untrained:
            share = 100 * (distilled - untrained) / (teacher - untrained)
            gained = f"The distilled blocks recover {share:.0f} % of the gap."
    else:
        rows, title, count = _image_rows(options)
        gained = ""
    record = {**surroundings([Path(sys.executable).name, *sys.argv]), "what": title, "count": count, "rows": rows}
    record["minutes"] = (time.perf_counter() - started) / 60
    write_json(options.out.with_suffix(".json"), record)
    text = _table(rows, title, count, gained)
    write_text(options.out.with_suffix(".md"), text)
    print(text)


def _text_rows(options: Text) -> tuple[dict[str, dict[str, float]], str, int]:
    blocks = load_config(options.config).model.layers[0].count
    encoders = {
        f"first {blocks} blocks, untrained": _untrained(options.config, []),
        f"{blocks} blocks, distilled": mmd2v.load(options.distilled),
        f"all {options.teacher_blocks} blocks: the teacher": _untrained(
            options.config, [f"--model.layers.0.count={options.teacher_blocks}"]
        ),
    }
    rows, count = {}, 0
    for name, encoder in encoders.items():
        found = pairs_of_file(
            lambda texts, encoder=encoder: text_features(encoder, texts, "mean"), options.pairs, limit=options.limit
        )
        kept = {key: value for key, value in found.metrics.items() if not key.startswith("chance")}
        rows[name], count = kept, found.pairs
    return rows, "text-pair retrieval, mean pooling, mean of R@1 and R@5 in both directions", count


def _image_rows(options: Image) -> tuple[dict[str, dict[str, float]], str, int]:
    distilled = mmd2v.load(options.distilled)
    untrained = _untrained(options.config, [])
    config = load_config(options.config)
    teacher = next(iter(build_teachers(config, torch.device("cpu")).values()))

    def taught(images: Sequence[torch.Tensor]) -> torch.Tensor:
        pixels = torch.stack([distilled.preprocess(image, i) for i, image in enumerate(images)])
        nothing = torch.zeros(0, dtype=torch.int64)
        return torch.nn.functional.normalize(teacher(Batch(pixels, nothing.int(), nothing.int(), nothing)).cls_BD)

    encode = {
        "student, untrained": lambda images: image_features(untrained, images, "pooled"),
        "student, distilled": lambda images: image_features(distilled, images, "pooled"),
        "the teacher": taught,
    }
    rows, count = {}, 0
    for name, one in encode.items():
        found = knn_of_folder(one, options.train, options.test, options.k)
        rows[name], count = {"mean": found.top1}, found.test_images
    return rows, f"{options.k}-NN classification, accuracy", count


def _untrained(path: Path, overrides: list[str]) -> Encoder:
    """The student as its config starts it."""
    with tempfile.TemporaryDirectory() as folder:
        export_untrained(path, overrides, Path(folder) / "export")
        return mmd2v.load(Path(folder) / "export")


def _table(rows: dict[str, dict[str, Any]], title: str, count: int, gained: str) -> str:
    half = max(binomial_half_width(row["mean"], count) for row in rows.values())
    lines = [f"| {title} | % |", "|---|---|"]
    lines += [f"| {name} | {100 * row['mean']:.1f} |" for name, row in rows.items()]
    note = f"{count:,} queries; by them alone a number is uncertain by ± {100 * half:.1f} at most. {gained}"
    return "\n".join([*lines, "", note.rstrip()]) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Annotated[Text | Image, tyro.conf.OmitSubcommandPrefixes]))
