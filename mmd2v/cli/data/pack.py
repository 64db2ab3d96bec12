"""`mmd2v data pack`: WebDataset shards of captioned images, or of text alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.data.sources import FORMATS, Format

_FORMAT_HELP = "; ".join(
    ["Format of SOURCE; auto looks at it", *(f"{name}: {kind.summary}" for name, kind in FORMATS.items())]
)


@dataclass(frozen=True)
class Pack:
    """Pack captioned images, or text alone, into WebDataset shards; the folder appears whole or not at all.

    Interrupted (Ctrl-C, kill), the command leaves OUT.partial, and the same command goes on behind its last finished
    shard; the result has the same bytes.
    """

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Caption file, folder or archive; see --format."""
    out: Path
    """Folder to create."""
    images: Annotated[tuple[Path, ...], arg(metavar="DIR|TAR ...")] = ()
    """Folders or uncompressed .tar files of the images; by default the folder of SOURCE."""
    format: Annotated[Format, arg(help=_FORMAT_HELP)] = "auto"
    split: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Splits to take from a Karpathy file, for example: --split train restval."""
    shard_size: int = 1000
    """Samples a shard."""
    resize: Annotated[int | None, arg(metavar="PX")] = None
    """Shrink images whose shorter side is longer than this, in pixels."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """Write the first N samples alone."""
    max_captions: Annotated[int | None, arg(metavar="N")] = None
    """Take the first N captions of an image alone."""
    max_pixels: Annotated[int | None, arg(metavar="N")] = None
    """Images of more pixels count as damaged (decompression bombs); by default training's limit, 100 million."""
    skip_bad: bool = False
    """Leave damaged samples out and count them by kind, instead of stopping at the first."""
    image_column: Annotated[str | None, arg(metavar="NAME")] = None
    """CSV column of image names; by default one of the usual names."""
    caption_column: Annotated[str | None, arg(metavar="NAME")] = None
    """CSV column of captions; by default one of the usual names."""
    passage_words: Annotated[int | None, arg(metavar="N")] = None
    """Most words of a passage of text; 256 by default. Texts are cut behind paragraphs, or else sentences."""

    def run(self) -> int:
        """Pack and print what was written."""
        from mmd2v.data.packing import pack

        report = pack(
            self.source,
            self.out,
            images=self.images,
            format=self.format,
            splits=self.split,
            shard_size=self.shard_size,
            resize=self.resize,
            image_column=self.image_column,
            caption_column=self.caption_column,
            max_captions=self.max_captions,
            passage_words=self.passage_words,
            limit=self.limit,
            max_pixels=self.max_pixels,
            skip_bad=self.skip_bad,
        )
        print(f"{self.out}: {report}")
        return 0
