"""`mmd2v data stats`: counts, sizes and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.data.common import SHARDS_HELP, Sourced, TokenizerKind, title
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Stats(Sourced):
    """Count images, captions, sizes and lengths; images are not decoded. Damage is counted, not an error."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=SHARDS_HELP)]
    tokenizer: Annotated[Path | None, arg(metavar="PATH")] = None
    """Count tokens too: file or folder of the tokenizer, as in data.tokenizer.path."""
    kind: TokenizerKind = "hf"
    """As in data.tokenizer.kind."""
    max_length: int = 64
    """Longest sequence, in tokens, special tokens included: how many captions would it cut?"""
    picture: Annotated[Path | None, arg(metavar="FILE.png|.svg")] = None
    """Draw histograms into this file."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write all numbers into this file."""

    def run(self) -> int:
        """Count, print the numbers, and write what was asked for."""
        from mmd2v.config.schema import TokenizerConfig
        from mmd2v.data.stats import data_stats
        from mmd2v.files import check_output, write_json
        from mmd2v.report.stats_picture import check_stats_picture, write_stats_picture

        if self.max_length < 1:
            raise UserError(f"--max-length: found {self.max_length}, expected at least 1")
        if self.picture is not None:
            check_stats_picture("--picture", self.picture)
        if self.json is not None:
            check_output("--json", self.json)
        settings = None
        if self.tokenizer is not None:
            settings = TokenizerConfig(kind=self.kind, path=str(self.tokenizer), max_length=self.max_length)
        stats = data_stats(self.shards, settings, source=self.source)
        print(stats)
        if self.json is not None:
            write_json(self.json, stats.to_json())
        if self.picture is not None:
            write_stats_picture(self.picture, stats, title(self.shards))
        return 0
