"""`mmd2v data bench`: how fast shards load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.data.common import SHARDS_HELP, Sourced


@dataclass(frozen=True)
class Bench(Sourced):
    """Measure how fast some shards load on this machine, stage by stage, and what limits."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=SHARDS_HELP)]
    size: int = 224
    """Side of the training image, in pixels."""
    batch: int = 64
    """Images of a batch."""
    workers: int = 1
    """Loader processes; 0 loads in this one."""
    seconds: float = 10.0
    """How long to measure, in seconds."""
    tokenizer: Annotated[Path | None, arg(metavar="PATH")] = None
    """File or folder of a tokenizer; without one the text is left out."""

    def run(self) -> int:
        """Measure and print a table."""
        from mmd2v.data.bench import bench

        report = bench(
            self.shards,
            size=self.size,
            batch=self.batch,
            workers=self.workers,
            seconds=self.seconds,
            tokenizer=self.tokenizer,
            source=self.source,
        )
        print(report)
        return 0
