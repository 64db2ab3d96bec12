"""`mmd2v embed`: write the embeddings of images or texts to a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Embed:
    """Write embeddings (safetensors, `embeddings` fp32 [N, E]) and, in .ids.json beside it, what each row is."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    out: Path
    """The .safetensors file to create."""
    images: Path | None = None
    """Folder of .jpg, .png and .webp images, searched with its subfolders."""
    texts: Path | None = None
    """UTF-8 file with a text a line."""
    batch_size: int = 64
    """Images or texts a forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v embed ARGV`` and return the exit status."""
    command = tyro.cli(Embed, args=list(argv), prog="mmd2v embed", description=sys.modules[__name__].__doc__)
    from mmd2v.embed import embed_images, embed_texts
    from mmd2v.errors import UserError
    from mmd2v.inference import load

    if (command.images is None) == (command.texts is None):
        raise UserError("mmd2v embed: give either --images FOLDER or --texts FILE")
    if command.out.suffix != ".safetensors":
        raise UserError(f"--out: found {command.out}, expected a name that ends in .safetensors")
    encoder = load(command.model, command.device, command.precision)
    if command.images is not None:
        shape = embed_images(encoder, command.images, command.out, command.batch_size)
    else:
        assert command.texts is not None  # checked above
        shape = embed_texts(encoder, command.texts, command.out, command.batch_size)
    print(f"{command.out}: {shape[0]:,} embeddings of width {shape[1]}")
    return 0
