"""The formats that fit in memory: a caption file beside its images, checked as a whole before anything is packed."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmd2v.data.captions import check_captions
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_files import ImageFiles, Stamp, open_images, stamp
from mmd2v.data.sources.base import Record, Source, SourceOptions, stops
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError


class CaptionFile(Source):
    """A source whose records are one list; a format tells how to `_read` it."""

    def __init__(self, peek: Peek, options: SourceOptions) -> None:
        """Raises UserError: bad input; without ``skip_bad`` also absent images, bad captions and duplicate ids."""
        self.path = peek.path
        self.options = options
        self._records = self._read(peek)
        if not self._records:
            raise UserError(f"{self.path}: found no image, expected at least one (format {self.format})")
        self.total = len(self._records)
        for record in self._records:
            if record.damage is not None:
                continue
            try:
                record.captions = list(check_captions(record.captions, f"{self.path}: image {record.image}"))
            except Damage as damage:
                record.damage = self._bad(damage)
        self._check_unique()
        self._files: ImageFiles | None = None
        if not options.find_images:
            return
        default = self.path if self.path.is_dir() else self.path.parent
        self._files = open_images(options.images or (default,), tolerant=options.skip_bad)
        self._stored = self._find_images(self._files)

    @abstractmethod
    def _read(self, peek: Peek) -> list[Record]:
        """Read the records; their captions are checked afterwards. Raises UserError: bad input."""

    def records(self) -> Iterator[Record]:
        """See `Source.records`."""
        yield from self._records

    def stamps(self) -> Iterator[Stamp]:
        """See `Source.stamps`."""
        if self.path.is_file():
            yield stamp(self.path)
        if self._files is not None:
            yield from self._files.stamps(self._stored)

    def _bad(self, damage: Damage) -> Damage:
        """Return the damage where bad samples are skipped, else raise it."""
        if not self.options.skip_bad:
            raise stops(damage, packing=self.options.packing) from None
        return damage

    def _check_unique(self) -> None:
        counts = Counter(record.id for record in self._records)
        repeated = [name for name, count in counts.items() if count > 1]
        if not repeated:
            return
        names = [record.image for record in self._records if record.id == repeated[0]]
        message = (
            f"{self.path}: found {len(repeated)} duplicate ids, expected each once: '{repeated[0]}' "
            f"({counts[repeated[0]]} times: {', '.join(map(str, names[:3]))})"
        )
        self._bad(Damage(DamageKind.DUPLICATE_KEY, message))
        seen: set[str] = set()
        for record in self._records:
            if record.id in seen and record.damage is None:
                text = f"{self.path}: image {record.image}: duplicate id '{record.id}'"
                record.damage = Damage(DamageKind.DUPLICATE_KEY, text)
            seen.add(record.id)

    def _find_images(self, files: ImageFiles) -> list[str]:
        """Give every record its image; a UserError, or damage, where one is absent. Returns the stored names."""
        stored: list[str] = []
        absent: list[Record] = []
        for record in self._records:
            name = files.find(str(record.image))
            if name is None:
                absent.append(record)
                continue
            record.read = partial(files.read, name)
            stored.append(name)
        if not absent:
            return stored
        more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
        self._bad(
            Damage(
                DamageKind.NO_IMAGE,
                f"{self.path}: {len(absent):,} of its {len(self._records):,} images are not in {files.name}: "
                f"{', '.join(str(record.image) for record in absent[:3])}{more}.{files.hint(str(absent[0].image))}",
            )
        )
        for record in absent:
            text = f"{self.path}: image {record.image} is not in {files.name}"
            record.damage = record.damage or Damage(DamageKind.NO_IMAGE, text)
        return stored

    def _require_json(self, peek: Peek) -> Any:
        """The content of a .json, or a UserError that names the format."""
        if peek.suffix != ".json":
            found = peek.suffix or "a folder"
            raise UserError(f"{self.path}: format {self.format} is a .json file, found {found}")
        return peek.content
