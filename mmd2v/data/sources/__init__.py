"""Where samples come from: one file a format, registered here.

A new format is a `Source` in a file of its own and one line in `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmd2v.data.sources.base import OPTION_FLAGS, Record, Source, SourceOptions
from mmd2v.data.sources.coco import Coco
from mmd2v.data.sources.csv_table import CsvTable
from mmd2v.data.sources.flickr import Flickr
from mmd2v.data.sources.folder import Folder
from mmd2v.data.sources.img2dataset import Img2dataset
from mmd2v.data.sources.karpathy import Karpathy
from mmd2v.data.sources.peek import Peek
from mmd2v.data.sources.text import Text
from mmd2v.data.sources.visual_genome import VisualGenome
from mmd2v.errors import UserError, nearest, unknown_name

__all__ = ["FORMATS", "Format", "Record", "Source", "SourceOptions", "open_source"]

FORMATS: dict[str, type[Source]] = {
    kind.format: kind for kind in (VisualGenome, Flickr, Coco, Karpathy, CsvTable, Img2dataset, Text, Folder)
}
"""Name → format, in the order in which they are asked whether a source is theirs: the least particular one is last."""

Format = Literal["auto", *FORMATS]  # type: ignore[valid-type] # the command line lists the names from here


def open_source(source: str | Path, format: str = "auto", options: SourceOptions | None = None) -> Source:
    """Open a caption file, folder or archive.

    Args:
        source: where it is.
        format: a name of `FORMATS`; auto looks at the file.
        options: what else was asked for.

    Raises:
        UserError: it is absent, of another format, or bad; or an option means nothing to its format.
    """
    options = options or SourceOptions()
    path = Path(source).expanduser()
    if format != "auto" and format not in FORMATS:
        raise unknown_name("--format", format, ["auto", *FORMATS])
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: not found, expected a caption file or a folder.{nearest(path.name, siblings)}")
    peek = Peek(path)
    kind = FORMATS[_detect(peek) if format == "auto" else format]
    for option, (flag, what) in OPTION_FLAGS.items():
        if getattr(options, option) not in (None, ()) and option not in kind.takes:
            having = ", ".join(name for name, other in FORMATS.items() if option in other.takes)
            raise UserError(f"{flag}: {path} has format {kind.format}, which has no {what} (only {having})")
    return kind(peek, options)


def _detect(peek: Peek) -> str:
    for name, kind in FORMATS.items():
        if kind.detect(peek):
            return name
    if peek.suffix != ".json":
        found = peek.suffix or "file without extension"
        raise UserError(
            f"{peek.path}: found a {found}, expected .json, .csv, .tsv, .txt, .jsonl, .tar or a folder; see --format"
        )
    raise UserError(
        f"{peek.path}: the JSON is none of: a list of {{image, caption}}; a list of Visual Genome's images with "
        "regions; COCO captions (images, annotations); Karpathy's dataset (images with sentences)"
    )
