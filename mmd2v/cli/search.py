"""`mmd2v search`: find images of a folder by a sentence or an image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Search:
    """Print the images of a folder that are nearest to a sentence or to an image, best first."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    images: Path
    """Folder of .jpg, .png and .webp images, searched with its subfolders."""
    text: str | None = None
    """What to look for, as a sentence."""
    image: Path | None = None
    """What to look for, as an image."""
    top: int = 5
    """Images to print."""
    picture: Path | None = None
    """Image file to write the result to."""
    cache: Path | None = None
    """Folder that keeps the embeddings between searches; by default ~/.cache/mmd2v."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v search ARGV`` and return the exit status."""
    command = tyro.cli(Search, args=list(argv), prog="mmd2v search", description=sys.modules[__name__].__doc__)
    from PIL import Image

    from mmd2v.errors import UserError
    from mmd2v.gallery import open_gallery
    from mmd2v.inference import load
    from mmd2v.report.retrieval_picture import Found, PictureRow, check_picture, write_retrieval_picture
    from mmd2v_kernels import cosine_topk

    if (command.text is None) == (command.image is None):
        raise UserError("mmd2v search: give either --text SENTENCE or --image FILE")
    if command.top < 1:
        raise UserError(f"--top: found {command.top}, expected at least 1")
    if command.picture is not None:
        check_picture("--picture", command.picture)
    encoder = load(command.model, command.device, command.precision)
    query = encoder.encode_image([command.image]) if command.image else encoder.encode_text([command.text or ""])
    gallery = open_gallery(encoder, command.model, command.images, command.cache)
    for message in gallery.unreadable:
        print(f"skipped {message}", file=sys.stderr)
    if not gallery.paths:
        raise UserError(f"--images: none of the {len(gallery.unreadable)} images in {command.images} can be read")

    scores, index = cosine_topk(query.cpu(), gallery.embeddings_ME, min(command.top, len(gallery.paths)))
    results = [(score, gallery.paths[i]) for score, i in zip(scores[0].tolist(), index[0].tolist(), strict=True)]
    for rank, (score, path) in enumerate(results, 1):
        print(f"{rank:>3}  {score:6.3f}  {path}")
    if command.picture is not None:
        shown = Image.open(command.image) if command.image else command.text or ""
        write_retrieval_picture(
            command.picture, [PictureRow(shown, [Found(Image.open(path), score) for score, path in results])]
        )
    if gallery.unreadable:
        total = len(gallery.paths) + len(gallery.unreadable)
        print(f"{len(gallery.unreadable)} of {total} images skipped: unreadable", file=sys.stderr)
    return 0
