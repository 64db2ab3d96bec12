"""The last page of the demo: a table of recall (chance, untrained, student, ceiling) and a picture of queries.

Run as ``python -m mmd2v.report.demo --run RUN --export EXPORT --shards SHARDS --out FOLDER``.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

from mmd2v.data.shards import ShardSet
from mmd2v.errors import UserError
from mmd2v.evaluation.ceiling import facts_ceiling
from mmd2v.files import write_json, write_text
from mmd2v.inference import load
from mmd2v.report.recall_table import chance_row, recall_table
from mmd2v.report.retrieval_picture import retrieval_rows, write_retrieval_picture
from mmd2v.train.metrics import METRICS_FILE, read_metrics

_PREFIX = "evaluation/"


@dataclass(frozen=True)
class Demo:
    """Show what the demo's run reached."""

    run: Path
    """Folder of the student's run."""
    export: Path
    """The student's export."""
    shards: Path
    """Held-out shards written by `mmd2v data synth`."""
    out: Path
    """Folder that receives recall.txt, recall.json and queries.png."""
    queries: int = 6
    """Sentences in the picture."""
    seed: int = 0
    """Which sentences are drawn."""


def main(argv: Sequence[str]) -> int:
    """Write table and picture and print the table."""
    options = tyro.cli(Demo, args=list(argv), prog="python -m mmd2v.report.demo")
    shards = ShardSet(str(options.shards))
    rows = recall_rows(options.run, shards)
    table = recall_table(rows)
    write_text(options.out / "recall.txt", table + "\n")
    write_json(options.out / "recall.json", rows)
    draw_queries(options, shards)
    print(f"\nRecall in percent on {len(shards)} scenes of combinations never seen in training\n\n{table}\n")
    print(f"picture: {options.out / 'queries.png'}")
    return 0


def recall_rows(run: Path, shards: ShardSet) -> dict[str, dict[str, float]]:
    """Return name → recall. Raises UserError unless the run measured its first and a later step."""
    measured = {
        record["step"]: {key.removeprefix(_PREFIX): value for key, value in record.items() if key.startswith(_PREFIX)}
        for record in read_metrics(run / METRICS_FILE)
        if f"{_PREFIX}i2t_R@1" in record
    }
    if 0 not in measured or len(measured) < 2:
        raise UserError(
            f"{run / METRICS_FILE}: recall at steps {sorted(measured)}, expected that of step 0 and of a later one; "
            "set data.eval and evaluation.at_start"
        )
    return {
        "chance": chance_row(measured[0]),
        "untrained student": measured[0],
        "student": measured[max(measured)],
        "ceiling (true facts)": facts_ceiling(shards),
    }


def draw_queries(options: Demo, shards: ShardSet) -> None:
    """Draw random sentences of the held-out set with their five nearest images."""
    encoder = load(options.export)
    samples = [shards.read(*shards.locate(position)) for position in range(len(shards))]
    images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
    chosen = random.Random(options.seed).sample(range(len(samples)), min(options.queries, len(samples)))
    texts = [samples[position].captions[0] for position in chosen]
    image_embeddings_ME: torch.Tensor = encoder.encode_image(images)
    rows = retrieval_rows(
        texts, encoder.encode_text(texts), image_embeddings_ME, chosen, open_image=lambda row: images[row]
    )
    write_retrieval_picture(options.out / "queries.png", rows, title="A sentence and its five nearest scenes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
