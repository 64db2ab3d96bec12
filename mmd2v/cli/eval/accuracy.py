"""`mmd2v eval accuracy`: a fine-tuned classifier on labelled shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of a run with the `classification` objective, by its own head, on labelled shards."""

    run_dir: Positional[Path]
    """Folder of the run, or one of its checkpoints."""
    shards: tuple[str, ...]
    """A folder of .tar files that `mmd2v data labelled` wrote, a path with {000..007} braces or wildcards."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which one of a run: the newest, or the best by the number that its checkpoint.best names."""
    json: Path | None = None
    """File to write the numbers to."""
    limit: int | None = None
    """Use only the first N samples."""
    batch_size: int = 64
    """Samples a forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def run(self) -> int:
        """Measure and print accuracy."""
        from mmd2v.cli.eval.common import short
        from mmd2v.evaluation.classified import accuracy_of_run
        from mmd2v.files import check_output, write_json

        if self.json is not None:
            check_output("--json", self.json)
        found = accuracy_of_run(
            self.run_dir,
            list(self.shards),
            limit=self.limit,
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            which=self.checkpoint,
        )
        print(found.text())
        if self.json is not None:
            names = ", ".join(short(Path(spec)) for spec in self.shards)
            write_json(self.json, {"data": names, **found.record()})
        return 0
