"""`mmd2v data show`: a contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.data.common import SHARDS_HELP, Sourced, title
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Show(Sourced):
    """Draw a contact sheet: some images, or texts, with their first captions. The same seed draws the same ones."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=SHARDS_HELP)]
    out: Annotated[Path, arg(metavar="FILE.png")]
    """Picture to write."""
    count: int = 24
    """Samples to show."""
    seed: int = 0
    """Which samples are drawn."""

    def run(self) -> int:
        """Draw and say how many of how many."""
        from mmd2v.data.shards import ShardSet
        from mmd2v.report.contact_sheet import draw_samples, write_sheet
        from mmd2v.report.retrieval_picture import check_picture

        if self.count < 1:
            raise UserError(f"--count: found {self.count}, expected at least 1")
        check_picture("--out", self.out)
        shards = ShardSet(self.shards, source=self.source, tolerant=True)
        cells = draw_samples(shards, self.count, self.seed)
        shown = f"{len(cells):,} of {len(shards):,} samples"
        write_sheet(self.out, cells, f"{title(self.shards)}: {shown}")
        print(f"{self.out}: {shown}")
        return 0
