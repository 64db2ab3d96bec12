"""`mmd2v data lengths`: tokens of every text, for batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.data.common import SHARDS_HELP, Sourced, TokenizerKind
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Lengths(Sourced):
    """Count the tokens of every text, which training in batches of tokens (data.batch_tokens) needs; resumable.

    Writes a small file a shard, NAME.tar.FINGERPRINT.lengths, that belongs to this tokenizer. Counts are without
    special tokens and before truncation, so that they serve every max_length.
    """

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=SHARDS_HELP)]
    tokenizer: Annotated[Path, arg(metavar="PATH")]
    """File or folder of the tokenizer, as in data.tokenizer.path."""
    kind: TokenizerKind = "hf"
    """As in data.tokenizer.kind."""
    max_length: int = 64
    """Only to say how many texts it cuts, special tokens included."""
    out: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder of the files, which the config then names as data.lengths_dir; by default beside the shards or, where
    these cannot be written, in the cache folder of this machine."""
    workers: int | None = None
    """Processes; by default one for each core."""

    def run(self) -> int:
        """Count and print totals."""
        from mmd2v.config.schema import TokenizerConfig
        from mmd2v.data.token_lengths import write_lengths

        if self.max_length < 1:
            raise UserError(f"--max-length: found {self.max_length}, expected at least 1")
        settings = TokenizerConfig(
            kind=self.kind, path=str(self.tokenizer), max_length=self.max_length, append_end=False
        )
        print(write_lengths(self.shards, settings, out=self.out, workers=self.workers, source=self.source))
        return 0
