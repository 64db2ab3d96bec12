"""`mmd2v export`: turn a run's checkpoint into a folder that `mmd2v.load` reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Export:
    """Turn a run's checkpoint into a self-contained folder: weights, config, tokenizer, model card."""

    run: Positional[Path]
    """Run directory or one of its checkpoint folders."""
    out: Path
    """Folder to create."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which one of a run directory: the newest, or the best by the number that its checkpoint.best names."""
    weights: Literal["student", "ema"] = "student"
    """The student's own weights, or their average over the steps (of a run with an `ema:MODALITY` teacher)."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v export ARGV`` and return the exit status."""
    command = tyro.cli(Export, args=list(argv), prog="mmd2v export", description=sys.modules[__name__].__doc__)
    from mmd2v.export import export

    out = export(command.run, command.out, average=command.weights == "ema", which=command.checkpoint)
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0
