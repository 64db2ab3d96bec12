"""`mmd2v eval retrieval`: image–text recall of an exported encoder on shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class Retrieval:
    """Image–text recall at 1, 5 and 10 in both directions; also under torchrun, each rank encoding its share."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    shards: tuple[str, ...]
    """A folder of .tar files, a path with {000..007} braces or wildcards; one or more."""
    json: Path | None = None
    """File to write the numbers to."""
    limit: int | None = None
    """Use only the first N images."""
    expect_images: int | None = None
    """Fail unless the set has this many images (COCO test: 5000, Flickr30K test: 1000)."""
    expect_captions: int | None = None
    """Fail unless the set has this many captions (COCO test: 25010, Flickr30K test: 5000)."""
    batch_size: int = 128
    """Images a rank and forward pass."""
    workers: int | None = None
    """Loader processes a rank; by default those of the export's config."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def run(self) -> int:
        """Measure and print a table."""
        from mmd2v.evaluation.exported import evaluate_export
        from mmd2v.files import write_json

        found = evaluate_export(
            self.model,
            list(self.shards),
            limit=self.limit,
            expected=(self.expect_images, self.expect_captions),
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            out=self.json,
        )
        if found is None:  # another rank than the first
            return 0
        print(found.text())
        if self.json is not None:
            write_json(self.json, found.record())
        return 0
