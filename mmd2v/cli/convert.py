"""`mmd2v convert`: turn a public data2vec 2.0 or BEiT-2 checkpoint into a folder that configs can name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Convert:
    """Turn a public checkpoint into safetensors in our names. Nothing in the file is executed."""

    checkpoint: Positional[Path]
    """File of fairseq (data2vec 2.0, .pt) or unilm (BEiT-2, .pth)."""
    out: Path
    """Folder to create."""
    heads: int | None = None
    """Attention heads, of a file whose config is missing or wrong."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v convert ARGV`` and return the exit status."""
    command = tyro.cli(Convert, args=list(argv), prog="mmd2v convert", description=sys.modules[__name__].__doc__)
    from mmd2v.errors import UserError
    from mmd2v.models.checkpoints.convert import convert

    if command.heads is not None and command.heads < 1:
        raise UserError(f"--heads: found {command.heads}, expected at least 1")
    conversion = convert(command.checkpoint, command.out, command.heads)
    sizes = conversion.architecture.model_dump(exclude_none=True)
    print(f"family        {conversion.family}")
    print(f"architecture  {', '.join(f'{name} {value}' for name, value in sizes.items())}")
    print(f"taken         {len(conversion.state)} keys, {sum(t.numel() for t in conversion.state.values()):,} numbers")
    ignored = ", ".join(f"{keys} ({count})" for keys, count in conversion.ignored.items())
    print(f"ignored       {sum(conversion.ignored.values())} keys{ignored and ': '}{ignored}")
    for file in sorted(command.out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0
