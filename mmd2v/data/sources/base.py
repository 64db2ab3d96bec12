"""What a source of samples is: something that yields records in an order that never changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmd2v.data.damage import Damage
from mmd2v.data.image_files import Stamp
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError, nearest


@dataclass
class Record:
    """One sample of a source, its image not read yet."""

    id: str
    """Stable: for images, the name without its extension."""
    image: str | None
    """Name of the image, as the source gives it; None: a text without image."""
    captions: list[str]
    extras: dict[str, Any] = field(default_factory=dict)
    """Further keys of the sample's JSON."""
    read: Callable[[], bytes] | None = None
    """Reads the encoded image, raising a `Damage`; may run in any thread."""
    damage: Damage | None = None
    """What makes the sample unusable, if that is known before its image is read."""


@dataclass(frozen=True)
class SourceOptions:
    """What the flags of `mmd2v data pack` ask of a source; a format refuses those it has no use for."""

    images: tuple[Path, ...] = ()
    """Folders or tars of the images; none: the folder of the source."""
    splits: tuple[str, ...] = ()
    """Splits to take."""
    image_column: str | None = None
    """CSV column with image names; none: one of the usual names."""
    caption_column: str | None = None
    """CSV column with captions; none: one of the usual names."""
    passage_words: int | None = None
    """Most words of a passage; none: `text.PASSAGE_WORDS`."""
    skip_bad: bool = False
    """Whether damaged samples become records with `Record.damage` instead of an error at once."""
    packing: bool = True
    """Whether messages may advise a flag of `mmd2v data pack`."""
    find_images: bool = True
    """Whether the images are looked for; without, records cannot be read. For captions alone."""


OPTION_FLAGS = {
    "images": ("--images", "separate images"),
    "splits": ("--split", "splits"),
    "image_column": ("--image-column", "columns"),
    "caption_column": ("--caption-column", "columns"),
    "passage_words": ("--passage-words", "passages"),
}
"""Option that only some formats take → (its flag, what the other formats have none of)."""


class Source(ABC):
    """A caption file, folder or archive of one format.

    Attributes:
        path: the file or folder.
        total: how many records there are, damaged ones included; None: not known beforehand.
    """

    format: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts."""
    takes: ClassVar[frozenset[str]] = frozenset({"images"})
    """Names of `OPTION_FLAGS` this format has a use for."""
    unit: ClassVar[str] = "images"
    """What its samples are, in the plural."""
    has_images: ClassVar[bool] = True

    path: Path
    total: int | None

    @abstractmethod
    def __init__(self, peek: Peek, options: SourceOptions) -> None:
        """Open the source and check as much as can be checked without reading all of a huge one.

        Raises:
            UserError: not this format, or bad input.
        """

    @staticmethod
    @abstractmethod
    def detect(peek: Peek) -> bool:
        """Whether a file or folder looks like this format; formats are asked in the order of the registry."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield the records, the same ones in the same order at every call."""

    @abstractmethod
    def stamps(self) -> Iterator[Stamp]:
        """Yield the stamps of all files the records come from, in a stable order."""


def stops(damage: Damage, *, packing: bool = True) -> UserError:
    """The error of a damaged sample where such samples are not skipped; ``packing``: and could be, by a flag."""
    text = str(damage)
    if not packing:
        return UserError(text)
    return UserError(f"{text}{'' if text.endswith(('.', '?')) else '.'} --skip-bad leaves such samples out")


def image_id(name: str) -> str:
    """The id of an image: its name without extension, with ``/`` between folders."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES else str(path)


def json_entry(path: Path, what: str, number: int, entry: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Check that a JSON entry is an object with these keys, or raise a UserError that names it by its number."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {what} {number} is a {type(entry).__name__}, expected an object")
    for key in keys:
        if key not in entry:
            raise UserError(f"{path}: {what} {number} has no '{key}'.{nearest(key, entry)} Found: {', '.join(entry)}")
    return entry


def image_name(path: Path, what: str, number: int, value: Any) -> str:
    """Check the name of an image file that a caption file gives, or raise a UserError."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {what} {number}: found image name {value!r}, expected a file name")
    return value.strip()
