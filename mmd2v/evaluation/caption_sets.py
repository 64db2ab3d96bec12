"""Images with their captions as evaluation reads them: from shards, or from a caption file beside its images."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmd2v.config.schema import SourceConfig
from mmd2v.data.damage import Damage
from mmd2v.data.shards import ShardSet
from mmd2v.data.sources import SourceOptions, open_source
from mmd2v.data.sources.base import OPTION_FLAGS
from mmd2v.errors import UserError

_ANNOTATIONS = (".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Captioned:
    """An image, still encoded, and its captions."""

    id: str
    captions: tuple[str, ...]
    image: bytes | memoryview | None
    """None of a set whose images are not read."""
    where: str
    """What messages call it."""


class CaptionSet(Protocol):
    """A fixed sequence of images with captions."""

    name: str
    """What messages and results call it: its path."""
    splits: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, rows: range) -> list[Captioned]:
        """Read some of them. Raises UserError where one cannot be read; safe in any one thread at a time."""


class ShardCaptions:
    """The samples of shards, in file order."""

    splits: tuple[str, ...] = ()

    def __init__(self, shards: Sequence[str], limit: int | None = None, source: SourceConfig | None = None) -> None:
        """Raises UserError: shards missing, damaged or without samples."""
        self.name = ", ".join(shards)
        self._set = ShardSet(list(shards), limit, source=source)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._set)

    def read(self, rows: range) -> list[Captioned]:
        """See `CaptionSet.read`."""
        with self._lock:
            samples = self._set.read_many([self._set.locate(row) for row in rows])
        found = []
        for sample in samples:
            if isinstance(sample, Damage):
                raise sample
            if sample.image is None:
                raise UserError(f"{sample.where}: no image, expected one beside its captions")
            found.append(Captioned(sample.id, sample.captions, sample.image, sample.where))
        return found


class AnnotatedCaptions:
    """The images of a caption file, in its order."""

    def __init__(
        self,
        path: str,
        images: Sequence[str] = (),
        splits: Sequence[str] = (),
        limit: int | None = None,
        *,
        find_images: bool = True,
    ) -> None:
        """Open a caption file; its format is told by its content, as `mmd2v data pack` does.

        ``images`` are folders, tars, or folders of tars; none: the folder of the file. Without ``find_images`` the
        captions and ids are all there is.
        Raises UserError: the file is bad, an image is absent, twice there or without caption.
        """
        self.name, self.splits = path, tuple(splits)
        places = tuple(place for one in images for place in _image_places(one))
        source = open_source(
            path,
            options=SourceOptions(images=places, splits=self.splits, packing=False, find_images=find_images),
        )
        if not source.has_images:
            raise UserError(f"{path}: holds {source.unit} without images, expected images with captions")
        self._find_images = find_images
        self._records = list(source.records())[:limit]

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: range) -> list[Captioned]:
        """See `CaptionSet.read`."""
        found = []
        for record in self._records[rows.start : rows.stop]:
            where = f"{self.name}: image {record.image}"
            if record.damage is not None:
                raise record.damage
            image = None
            if self._find_images:
                if record.read is None:
                    raise UserError(f"{where}: no image, expected one beside its captions")
                image = record.read()
            found.append(Captioned(record.id, tuple(record.captions), image, where))
        return found


def open_captions(
    data: Sequence[str],
    images: Sequence[str] = (),
    splits: Sequence[str] = (),
    limit: int | None = None,
    *,
    source: SourceConfig | None = None,
    find_images: bool = True,
) -> CaptionSet:
    """Open one caption file, or shards, whichever ``data`` names.

    ``images`` and ``splits`` belong to a caption file; ``source`` says how shards that are no local files are fetched.
    Raises UserError as the two classes do, and for flags that belong to the other one.
    """
    if not data:
        raise UserError("DATA: missing, expected a caption file such as dataset_coco.json, or shards")
    annotated = [one for one in data if _is_annotation(one)]
    if annotated:
        if len(data) > 1:
            raise UserError(f"DATA: found {len(data)} names with the caption file {annotated[0]}, expected it alone")
        return AnnotatedCaptions(data[0], images, splits, limit, find_images=find_images)
    for option, given in (("images", images), ("splits", splits)):
        if given:
            flag, what = OPTION_FLAGS[option]
            raise UserError(f"{flag}: {', '.join(data)} is read as shards, which have no {what}; leave it out")
    return ShardCaptions(data, limit, source)


def _is_annotation(name: str) -> bool:
    """Whether a name is of a caption file, or of a folder of images with texts beside them."""
    path = Path(name).expanduser()
    if path.suffix.lower() in _ANNOTATIONS:
        return not name.startswith("pipe:") and "://" not in name
    return path.is_dir() and not _tars(path) and any(entry.suffix.lower() == ".txt" for entry in path.rglob("*"))


def _image_places(name: str) -> list[Path]:
    """A folder of tars stands for the tars in it; everything else for itself."""
    path = Path(name).expanduser()
    tars = _tars(path) if path.is_dir() else []
    return tars or [path]


def _tars(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder) if name.endswith(".tar"))
