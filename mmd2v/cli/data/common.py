"""What the subcommands of `mmd2v data` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mmd2v.config.load import load_config
from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import display

TokenizerKind = Literal["hf", "sentencepiece", "fairseq_gpt2"]

SHARDS_HELP = (
    "A folder of .tar files; a path with {000..007} braces or wildcards; an address (https://, s3://, any of fsspec's) "
    "of a folder or shards; pipe:COMMAND; a .txt list of these or a shards.json; one or more."
)


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """What every command has that reads shards from wherever they are."""

    config: Annotated[Path | None, arg(metavar="CONFIG.yaml")] = None
    """Config of a run whose data.source says how addresses are fetched (cache, access, storage options)."""

    @property
    def source(self) -> SourceConfig | None:
        """How shards that are no local files are fetched; None: the defaults. Raises UserError: no such config."""
        return None if self.config is None else load_config(self.config).data.source


def title(shards: Sequence[str]) -> str:
    """What a picture calls some shards: where they are, short."""
    first = "/".join(Path(display(shards[0])).parts[-2:])
    return first if len(shards) == 1 else f"{first} and {len(shards) - 1} more"
